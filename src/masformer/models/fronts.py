"""Classes put in front of the class of a live object (as FSDP2 does), and taken away again."""

from __future__ import annotations

import functools
import inspect
from typing import Any


class Front:
    """What goes in front: its methods run first, and `super()` reaches those of the object's own class.

    `entered` and `left` are called with the object when its class has changed.
    """

    forward_names: tuple[str, ...]
    """Names of the arguments of the own class's `forward`, in order."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """How to copy or pickle an object whose class was made here: by the two classes it was made of."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_blank, type(self).__bases__, *reduced[2:])

    def entered(self) -> None:
        pass

    def left(self) -> None:
        pass


def enter(part: Any, front: type[Front]) -> None:
    """Put a class in front of an object's own."""
    part.__class__ = _in_front(front, type(part))  # type: ignore[arg-type]
    part.entered()


def leave(part: Any) -> None:
    """Undo `enter`."""
    part.left()
    part.__class__ = type(part).__bases__[1]


def front_of(part: Any) -> type:
    """The class that stands in front, where one does."""
    return type(part).__bases__[0]


def _blank(front: type[Front], behind: type) -> Any:
    cls: Any = _in_front(front, behind)  # type: ignore[arg-type]
    return cls.__new__(cls)


@functools.cache
def _in_front(front: type[Front], behind: Any) -> type:
    """A class that is `front` before `behind`, under the name and module of the latter."""
    names = tuple(name for name in inspect.signature(behind.forward).parameters if name not in ("self", "kwargs"))
    members = {"__module__": behind.__module__, "__doc__": behind.__doc__, "forward_names": names}
    return type(behind.__name__, (front, behind), members)
