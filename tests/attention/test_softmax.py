"""Soft-capping and sink logits: the same as in the reference, for every span, and no matrix over all pairs."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from masformer.attention import Segments, attend
from masformer.attention.reference import reference
from masformer.spans import Block, Full, Span, Window

SPANS = [Full(), Block(7), Block(64, lookback=1, sinks=3), Block(600), Window(9), Window(100, sinks=4)]
EXTRAS = [{"softcap": 1.5}, {"sink_logits": True}, {"softcap": 2.0, "sink_logits": True}, {"eager": True}]


def inputs(length: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = ((batch, 4, length, 8), (batch, 2, length, 8), (batch, 2, length, 6), (4,))
    q, k, v, sinks = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in sizes)
    return q, k, v, sinks


def gradients(out: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad((out * torch.randn_like(out)).sum(), tensors)]


@pytest.mark.parametrize("length", [1, 5, 130, 1100])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_values_and_gradients(span: Span, extras: dict[str, object], length: int) -> None:
    q, k, v, sinks = inputs(length)
    given = {name: sinks if name == "sink_logits" else value for name, value in extras.items()}
    tensors = [q, k, v, *([sinks] if "sink_logits" in given else [])]
    got = gradients(attend(q, k, v, span, **given), tensors)
    expected = gradients(reference(q, k, v, span, **{name: x for name, x in given.items() if name != "eager"}), tensors)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_packed_and_padded_rows(span: Span) -> None:
    q, k, v, sinks = inputs(30, batch=2)
    mask = (torch.arange(30) >= torch.tensor([[4], [0]])).long()
    segments = Segments.of(2, 30, attention_mask=mask)
    got = attend(q, k, v, span, segments=segments, softcap=2.0, sink_logits=sinks)
    expected = reference(*(x[:1, :, 4:] for x in (q, k, v)), span, softcap=2.0, sink_logits=sinks)
    torch.testing.assert_close(got[:1, :, 4:], expected, rtol=0, atol=1e-10)
    assert not got[:1, :, :4].any()


@pytest.mark.parametrize("seen", [1, 40, 700])
def test_new_tokens_after_a_cache(seen: int) -> None:
    q, k, v, sinks = inputs(seen + 3)
    got = attend(q[:, :, seen:], k, v, Full(), softcap=2.0, sink_logits=sinks)
    torch.testing.assert_close(
        got, reference(q[:, :, seen:], k, v, Full(), softcap=2.0, sink_logits=sinks), rtol=0, atol=1e-10
    )


class Largest(TorchDispatchMode):
    """The most elements that any tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("span", [Full(), Block(64), Block(2048), Window(100, sinks=4)], ids=str)
def test_nothing_over_all_pairs_is_made(span: Span) -> None:
    q, k, v, sinks = (x.detach() for x in inputs(4096))
    with Largest() as largest:
        attend(q, k, v, span, softcap=2.0, sink_logits=sinks)
    assert largest.elements <= 4 * 512 * 4097  # heads, queries at a time, keys and the sink
