"""A gate at every layer between its full attention and a local one: its gradient is a score, its learning a search.

The attention of a layer becomes gate * full + (1 - gate) * local. With all gates at 1 the model is the parent, and
minus the loss's derivative by a gate is, to first order, what the loss gains when that layer alone goes local. Learned
gates (LoZA, arXiv 2512.23966; ConSA, arXiv 2606.18056; per head DuoAttention, arXiv 2410.10819) weigh all layers at
once, each beside what the others have become.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.sequences import IGNORED
from ..errors import InputError
from ..models.convert import applied
from ..models.families import attention_modules
from ..models.head import Head
from ..models.interface import Watch, watched
from ..models.selfcheck import evaluating
from ..spans import Span
from ..training.loss import chunked_loss
from .probes import Probe
from .space import Space

STRETCH = (-0.1, 1.1)
TEMPERATURE = 2 / 3
"""Of the hard concrete distribution (Louizos et al., arXiv 1712.01312, section 2.2 and appendix A)."""


@contextlib.contextmanager
def gated(model: Any, space: Space, gates: Tensor) -> Iterator[None]:
    """Inside the block every layer with a choice mixes its full attention and its shortest span by its gate, of
    `gates` `[layers]`; the loss can be differentiated by them, and by nothing else.
    """

    def blend(local: Span, gate: Tensor) -> Watch:
        def mixed(span: Span, over: Callable[[Span], Tensor], *_: Any) -> Tensor:
            full = over(span)
            return torch.lerp(over(local), full, gate.to(full.dtype))  # exact at both ends

        return mixed

    modules = attention_modules(model)
    blends = [blend(space.shortest[layer], gates[layer]) for layer in space.layers]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with applied(model, space.parent), watched([modules[layer] for layer in space.layers], blends), evaluating(model):
        for parameter in learned:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learned:
                parameter.requires_grad_(True)


def loss_of(model: Any, probe: Probe) -> Tensor:
    """Nats per predicted token of a probe, a scalar with its graph; never the logits of all places at once."""
    ids = probe.ids[None].to(model.device)
    labels = torch.full_like(ids, IGNORED)
    labels[:, probe.places] = ids[:, probe.places]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return chunked_loss(hidden, labels, Head.of(model), total=len(probe.places)).loss


def first_order(model: Any, space: Space, probes: Sequence[Probe], points: Sequence[float] = (1.0,)) -> list[float]:
    """Nats that the loss gains when a layer goes local, to first order; a number per layer, 0 without a choice.

    One forward and backward of each probe for all layers together: gradient times change of the layer's output.

    Args:
        points: where all gates stand while the derivative is taken: 1 is the parent. Each probe takes the next one.
            With points all over 0 to 1 it is the mean along the way from the parent to all local (integrated
            gradients, arXiv 1703.01365): what each layer has in the whole loss.
    """
    total = torch.zeros(len(space.options))
    for probe, point in zip(probes, itertools.cycle(points), strict=False):
        gates = torch.full((len(space.options),), point, requires_grad=True)
        with gated(model, space, gates.to(model.device)):
            loss_of(model, probe).backward()
        total -= gates.grad if gates.grad is not None else 0
    if not bool(total.isfinite().all()):
        raise InputError("a gradient of the loss is not a finite number: the model is not usable")
    return [float(x) for x in total / len(probes)]


def learned(
    model: Any,
    space: Space,
    probes: Sequence[Probe],
    *,
    count: int,
    hard: bool = False,
    rate: float = 0.1,
    seed: int = 0,
) -> list[float]:
    """How far each layer's gate stays open when the loss is learned together with a pressure to close all but `count`.

    The weights are frozen. The pressure is a multiplier that grows while more than `count` gates are open and falls
    while fewer are (dual ascent, as in ConSA): on the sum of gates (L1), or with `hard` on the expected number of those
    that are not shut (L0), which are then drawn from the hard concrete distribution at every step.

    Args:
        probes: one for every step.
        rate: of Adam.
    """
    layers, random = len(space.options), torch.Generator().manual_seed(seed)
    raw = torch.full((layers,), 2.0 if hard else 1.0, requires_grad=True)
    free = torch.zeros(layers).index_fill(0, torch.tensor(space.layers), 1.0)
    optimizer = torch.optim.Adam([raw], lr=rate, betas=(0.9, 0.99))
    pressure = 0.0
    for step, probe in enumerate(probes):
        open_, gates = _hard(raw, random) if hard else (raw.clamp(0, 1), raw.clamp(0, 1))
        target = len(space.layers) + (count - len(space.layers)) * min(1.0, 1.5 * (step + 1) / len(probes))
        with gated(model, space, gates.to(model.device)):
            excess = ((open_ * free).sum() - target) / len(space.layers)
            (loss_of(model, probe) + pressure * excess).backward()
        pressure = max(0.0, pressure + PRESSURE_RATE * float(excess.detach()))
        optimizer.step()
        optimizer.zero_grad()
        if not hard:
            with torch.no_grad():
                raw.clamp_(0, 1)
    return [float(x) for x in (_open(raw) if hard else raw).detach()]


PRESSURE_RATE = 5.0
"""Of the multiplier, per step and share of the layers that are open beyond what was asked for."""


def _open(raw: Tensor) -> Tensor:
    """The probability of each gate not to be shut (arXiv 1712.01312, equation 12)."""
    return torch.sigmoid(raw - TEMPERATURE * math.log(-STRETCH[0] / STRETCH[1]))


def _hard(raw: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Probabilities not to be shut, and gates drawn so, 0 and 1 among them (equations 10 and 11)."""
    uniform = torch.rand(raw.shape, generator=random).clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((uniform.log() - (1 - uniform).log() + raw) / TEMPERATURE)
    low, high = STRETCH
    return _open(raw), (soft * (high - low) + low).clamp(0, 1)
