"""Every probe of the self-check catches a bug that is put in on purpose, and a failed check leaves no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from masformer.attention import Segments, attend
from masformer.attention.reference import reference
from masformer.errors import MasformerError
from masformer.models import interface
from masformer.models.cache import SpanLayer
from masformer.models.convert import convert, is_converted, plan_of
from masformer.models.selfcheck import SelfCheckError, selfcheck
from masformer.spans import Block, Full, Span, SpanPlan, Window

from .helpers import FEW, FULL, MIXED, logits, state, tiny, tokens

WINDOWS = SpanPlan((Window(4), Window(6, 1), Full(), Window(300)))
BLOCKS = SpanPlan((Block(4), Block(300, sinks=1), Full(), Block(5, 1)))
PLANS = [MIXED, FULL, WINDOWS, BLOCKS, SpanPlan((Window(1),) * 4), SpanPlan((Block(1),) * 4)]

Attend = Callable[..., Tensor]


def larger(q: Tensor, k: Tensor, v: Tensor, span: Span, **kwargs: Any) -> Tensor:
    """Off by one: a window sees one key too many."""
    return attend(q, k, v, Window(span.size + 1, span.sinks) if isinstance(span, Window) else span, **kwargs)


def smaller(q: Tensor, k: Tensor, v: Tensor, span: Span, **kwargs: Any) -> Tensor:
    """Off by one the other way."""
    changed = Window(span.size - 1, span.sinks) if isinstance(span, Window) and span.size > 1 else span
    return attend(q, k, v, changed, **kwargs)


def no_sinks(q: Tensor, k: Tensor, v: Tensor, span: Span, **kwargs: Any) -> Tensor:
    return attend(q, k, v, Window(span.size) if isinstance(span, Window) else span, **kwargs)


def always_full(q: Tensor, k: Tensor, v: Tensor, span: Span, **kwargs: Any) -> Tensor:
    return attend(q, k, v, Full(), **kwargs)


def future(q: Tensor, k: Tensor, v: Tensor, span: Span, **kwargs: Any) -> Tensor:
    """Full layers lose their causality in prefill."""
    if isinstance(span, Full) and q.shape[2] == k.shape[2] > 1:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return attend(q, k, v, span, **kwargs)


def no_documents(q: Tensor, k: Tensor, v: Tensor, span: Span, segments: Segments, **kwargs: Any) -> Tensor:
    """Segments dropped: every row is one document."""
    plain = Segments(segments.seen, segments.new)
    return attend(q, k, v, span, segments=plain, **kwargs)


def decodes_wrongly(q: Tensor, k: Tensor, v: Tensor, span: Span, **kwargs: Any) -> Tensor:
    """The newest key is forgotten when there is one query."""
    if q.shape[2] == 1 and k.shape[2] > 1:
        v = torch.cat([v[:, :, :-1], torch.zeros_like(v[:, :, -1:])], dim=2)
    return attend(q, k, v, span, **kwargs)


def nan(q: Tensor, k: Tensor, v: Tensor, span: Span, **kwargs: Any) -> Tensor:
    return attend(q, k, v, span, **kwargs) * float("nan")


@pytest.mark.parametrize(
    ("bug", "plan", "probe"),
    [
        (larger, WINDOWS, "'span' failed: layer 0 sees token 19 beyond window:4"),
        (smaller, WINDOWS, "'span' failed: layer 0 does not see token 20"),
        (no_sinks, MIXED, r"'span' failed: layer 2 does not see its sinks \(window:4:sinks=2\)"),
        (always_full, BLOCKS, "'span' failed: layer 0 sees token 19 beyond block:4"),
        (future, MIXED, "'future' failed"),
        (future, FULL, "'future' failed"),
        (decodes_wrongly, MIXED, "'prefill against decoding' failed"),
        (decodes_wrongly, FULL, "'prefill against decoding' failed"),
        (no_documents, MIXED, "'left padding' failed"),
        (no_documents, FULL, "'left padding' failed"),
        (nan, MIXED, "failed"),
    ],
)
def test_a_bug_in_attention_is_caught(bug: Attend, plan: SpanPlan, probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "attend", bug)
    check_caught(plan, probe)


def check_caught(plan: SpanPlan, probe: str) -> None:
    """The conversion fails naming the probe, and leaves the model as it was."""
    model, ids = tiny(), tokens(20)
    before, expected = state(model), logits(model, ids)
    with pytest.raises(SelfCheckError, match=probe):
        convert(model, plan)
    assert not is_converted(model)
    assert state(model) == before
    assert torch.equal(logits(model, ids), expected)


def segments_with(monkeypatch: pytest.MonkeyPatch, **ignored: None) -> None:
    """`Segments.of` that never hears of some argument."""
    true_of = Segments.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Segments], batch: int, new: int, **kwargs: Any) -> Segments:
        return true_of(cls, batch, new, **{**kwargs, **ignored})  # type: ignore[no-any-return]

    monkeypatch.setattr(Segments, "of", classmethod(of))


def test_an_ignored_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding tokens all have position 0: without the mask each is a document, and the last one too many."""
    true_of = Segments.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Segments], batch: int, new: int, attention_mask: Any = None, **kwargs: Any) -> Segments:
        if attention_mask is not None and not attention_mask.all():
            kwargs["position_ids"] = None
        return true_of(cls, batch, new, attention_mask=None, **kwargs)  # type: ignore[no-any-return]

    monkeypatch.setattr(Segments, "of", classmethod(of))
    check_caught(MIXED, "'left padding' failed")


def test_ignored_positions_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    segments_with(monkeypatch, position_ids=None)
    check_caught(MIXED, "'packed documents' failed")
    check_caught(FULL, "'packed documents' failed")


def test_a_cache_that_loses_content_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true_drop = SpanLayer._drop

    def drop(self: SpanLayer, segments: Segments) -> None:
        true_drop(self, segments)
        if self.first:
            self.keys = self.keys.clone()
            self.keys[:, :, self.span.sinks] = 0

    monkeypatch.setattr(SpanLayer, "_drop", drop)
    check_caught(MIXED, "'prefill against decoding' failed")


def test_a_cache_without_its_sinks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_sinks(self: SpanLayer, segments: Segments) -> Tensor:
        return torch.full((1, self.span.sinks), self.keys.shape[2] - 1)

    monkeypatch.setattr(SpanLayer, "_sink_index", wrong_sinks)
    check_caught(MIXED, "'prefill against decoding' failed")


def test_a_cache_too_short_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key too few for what comes next."""
    true_needed = Segments.first_needed

    def needed(self: Segments, span: Span) -> int:
        first = true_needed(self, span)
        return min(first + 1, self.seen + self.new) if first else 0

    monkeypatch.setattr(Segments, "first_needed", needed)
    check_caught(MIXED, "'prefill against decoding' failed")


def test_a_layer_without_our_attention_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose layer 2 never reaches the attention interface."""
    model = tiny()
    plan = SpanPlan((Window(3),) * 4)
    module = model.model.layers[2].self_attn
    true_forward = module.forward

    def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
        span, module.span = module.span, Full()
        try:
            return true_forward(hidden_states, **kwargs)
        finally:
            module.span = span

    monkeypatch.setattr(module, "forward", forward)
    with pytest.raises(SelfCheckError, match="layer 2 sees token 20 beyond window:3"):
        convert(model, plan)
    assert not is_converted(model)


def test_a_failed_second_conversion_keeps_the_first_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = convert(tiny(), MIXED), tokens(20)
    before, expected = state(model), logits(model, ids)
    with monkeypatch.context() as patch:
        patch.setattr(interface, "attend", larger)
        with pytest.raises(SelfCheckError):
            convert(model, WINDOWS)
    assert plan_of(model) == MIXED
    assert state(model) == before
    assert torch.equal(logits(model, ids), expected)


def test_the_check_can_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "attend", larger)
    assert plan_of(convert(tiny(), WINDOWS, check=False)) == WINDOWS


def test_errors_have_an_exit_code() -> None:
    assert issubclass(SelfCheckError, MasformerError)
    assert "\n" not in str(SelfCheckError("one line"))


# Without a bug


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FEW)
def test_sound_models_pass(family: str, dtype: torch.dtype, plan: SpanPlan) -> None:
    convert(tiny(family, dtype), plan)


@pytest.mark.parametrize("seed", range(10))
def test_sound_models_pass_whatever_their_weights(seed: int) -> None:
    convert(tiny(seed=seed, dtype=torch.float32, initializer_range=0.02 * (seed + 1)), MIXED)


@pytest.mark.parametrize("training", [True, False])
def test_success_leaves_the_model_as_it_was(training: bool) -> None:
    model = convert(tiny(attention_dropout=0.5), MIXED, check=False).train(training)
    model.model.layers[1].eval()
    before, torch_state = state(model), torch.random.get_rng_state()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    selfcheck(model)
    assert state(model) == before
    assert plan_of(model) == MIXED
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_failure_leaves_mode_and_spans_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert(tiny(), MIXED, check=False).train()
    before = state(model)
    monkeypatch.setattr(interface, "attend", future)
    with pytest.raises(SelfCheckError):
        selfcheck(model)
    assert state(model) == before
    assert plan_of(model) == MIXED


def test_the_probes_do_not_depend_on_attend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense oracle in place of `attend`, without a cache that drops: the probes judge what they see."""

    def oracle(q: Tensor, k: Tensor, v: Tensor, span: Span, *, segments: Segments, scale: Any, **others: Any) -> Tensor:
        total = segments.seen + segments.new
        if k.shape[2] != total or segments.pieces is not None:
            return attend(q, k, v, span, segments=segments, scale=scale)
        return reference(q, k, v, span, scale=scale)

    monkeypatch.setattr(interface, "attend", oracle)
    convert(tiny(), MIXED)


def test_meta_models_are_not_probed() -> None:
    assert plan_of(convert(tiny().to("meta"), MIXED)) == MIXED


def test_a_vocabulary_of_two() -> None:
    convert(tiny(vocab_size=4), MIXED)


def test_models_that_do_not_use_a_cache() -> None:
    convert(tiny(use_cache=False), MIXED)
