"""Conversion: what it computes, what it leaves alone, what it puts back, what it refuses."""

import copy
import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForSequenceClassification,
    MinistralConfig,
    MinistralForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from masformer.attention import UnsupportedSpan
from masformer.errors import InputError
from masformer.models.convert import applied, convert, is_converted, plan_of, restore
from masformer.models.families import class_of
from masformer.spans import Block, Full, PlanError, Span, SpanPlan, Window

from .helpers import FEW, FULL, MIXED, additive_mask, close, config_of, dense_masks, logits, state, tiny, tokens

LOCAL: list[Span] = [
    Block(1),
    Block(2),
    Block(5),
    Block(3, lookback=2),
    Block(4, lookback=1, sinks=2),
    Block(100),
    Window(1),
    Window(2),
    Window(7),
    Window(4, sinks=3),
    Window(100),
]


def uniform(span: Span, layers: int = 4) -> SpanPlan:
    return SpanPlan((span,) * layers)


# What it computes


def steps(model: PreTrainedModel, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    cache, out = None, []
    with torch.no_grad():
        for piece in ids.split(pieces, dim=1):
            got = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = got.past_key_values
            out.append(got.logits)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FEW)
def test_all_full_changes_no_bit(family: str, dtype: torch.dtype) -> None:
    model, ids = tiny(family, dtype), tokens(37, batch=2)
    pieces = [20, 1, 9, 1, 1, 5]
    before = [logits(model, ids, use_cache=False), logits(model, ids), steps(model, ids, pieces)]
    made = model.generate(
        ids[:, :9], max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    convert(model, FULL)
    after = [logits(model, ids, use_cache=False), logits(model, ids), steps(model, ids, pieces)]
    remade = model.generate(
        ids[:, :9], max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for name, x, y in zip(("no cache", "cache", "steps"), before, after, strict=True):
        assert torch.equal(x, y), name
    assert torch.equal(made.sequences, remade.sequences)
    assert all(torch.equal(x, y) for x, y in zip(made.logits, remade.logits, strict=True))


@pytest.mark.parametrize("family", FEW)
def test_all_full_with_gradients_changes_no_bit(family: str) -> None:
    model, ids = tiny(family, torch.float32), tokens(30, batch=2)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    convert(model, FULL)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(torch.equal(x, p.grad) for x, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("span", LOCAL, ids=str)
@pytest.mark.parametrize("family", FEW)
def test_uniform_plan_equals_the_parent_under_a_mask(family: str, span: Span) -> None:
    model, ids = tiny(family), tokens(41, batch=2)
    expected = logits(model, ids, attention_mask=additive_mask(span, 41).expand(2, -1, -1, -1), use_cache=False)
    full = logits(model, ids, use_cache=False)
    assert span.start(40) == 0 or (full - expected).abs().max() > 1e-3  # the mask matters
    convert(model, uniform(span), check=False)
    close(logits(model, ids, use_cache=False), expected)
    close(logits(model, ids), expected)


@pytest.mark.parametrize("family", FEW)
def test_mixed_plan_equals_the_parent_under_masks(family: str) -> None:
    model, ids = tiny(family), tokens(300)
    plan = SpanPlan((Block(70), Full(), Window(33, sinks=4), Block(16, lookback=2, sinks=1)))
    with dense_masks(model, plan, 300):
        expected = logits(model, ids, use_cache=False)
    convert(model, plan, check=False)
    close(logits(model, ids), expected)


def test_gradients_equal_those_of_the_parent_under_masks() -> None:
    model, ids = tiny("qwen3"), tokens(60)
    with dense_masks(model, MIXED, 60):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    convert(model, MIXED, check=False)
    model(input_ids=ids, labels=ids).loss.backward()
    for x, parameter in zip(expected, model.parameters(), strict=True):
        close(parameter.grad, x)


def test_window_plan_equals_ministral() -> None:
    """transformers' own mixed family, with the weights of a Llama."""
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    llama, ids = tiny("llama"), tokens(50, batch=2)
    values = {k: v for k, v in llama.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = MinistralConfig(**{**values, "layer_types": types, "sliding_window": 7})
    config._attn_implementation = "sdpa"
    ministral = MinistralForCausalLM(config).double().eval()
    ministral.load_state_dict(llama.state_dict(), strict=True)
    convert(llama, SpanPlan(tuple(Window(7) if kind.startswith("sliding") else Full() for kind in types)))
    assert (logits(ministral, ids) - logits(restore(copy.deepcopy(llama)), ids)).abs().max() > 1e-3
    close(logits(llama, ids), logits(ministral, ids))
    close(steps(llama, ids, [13, 1, 1, 35]), logits(ministral, ids))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_native_windows_are_replaced(family: str) -> None:
    """A parent with spans of its own: the plan alone decides, also against its cache of sliding layers."""
    changes: dict[str, Any] = {"sliding_window": 6}
    if family != "mistral":
        changes |= {"use_sliding_window": True, "max_window_layers": 2}
    model, ids = tiny(family, **changes), tokens(40)
    native = plan_of(model)
    assert native == (uniform(Window(6)) if family == "mistral" else SpanPlan((Full(), Full(), Window(6), Window(6))))
    own = logits(model, ids)
    with dense_masks(model, MIXED, 40):
        expected = logits(model, ids, use_cache=False)
    convert(model, native)
    close(logits(model, ids), own)
    convert(model, MIXED)
    close(logits(model, ids), expected)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, piece, past_key_values=cache) for piece in ids.split([25, 1, 14], dim=1)]
    close(torch.cat(parts, dim=1), expected)
    made = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(made, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))
    restore(model)
    assert torch.equal(logits(model, ids), own)


@pytest.mark.parametrize("span", [Block(4), Block(3, 1), Window(5), Window(3, sinks=2)], ids=str)
def test_one_layer_is_local_by_gradient(span: Span) -> None:
    """Through a whole layer with norms, projections and MLP, exactly 0 beyond the span and not 0 within."""
    model = convert(tiny(num_hidden_layers=1), uniform(span, 1))
    inputs = model.get_input_embeddings()(tokens(23)).detach().requires_grad_()
    out = model(inputs_embeds=inputs, use_cache=False).logits[0].sum(-1)
    for t in range(23):
        (grad,) = torch.autograd.grad(out[t], inputs, retain_graph=True)
        assert (grad[0].abs().sum(-1) != 0).tolist() == [span.sees(t, s) for s in range(23)]


def test_four_window_layers_reach_four_windows() -> None:
    model = convert(tiny(), uniform(Window(3)))
    inputs = model.get_input_embeddings()(tokens(30)).detach().requires_grad_()
    (grad,) = torch.autograd.grad(model(inputs_embeds=inputs).logits[0, 25].sum(), inputs)
    assert grad[0].abs().sum(-1).nonzero()[:, 0].tolist() == list(range(25 - 4 * 2, 26))


def test_gradient_checkpointing_changes_nothing() -> None:
    model, ids = convert(tiny(), MIXED).train(), tokens(40, batch=2)
    calls = []
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert len(calls) == 3  # the second time the layer ran twice
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    with pytest.raises(UnsupportedSpan, match="gradient checkpointing"):
        model(input_ids=ids, past_key_values=DynamicCache())


def test_training_with_dropout() -> None:
    model, ids = convert(tiny(attention_dropout=0.5), MIXED), tokens(40)
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    first, second = (model(input_ids=ids, labels=ids).loss for _ in range(2))
    assert first != second
    first.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("plan", [FULL, MIXED], ids=str)
def test_autocast(plan: SpanPlan) -> None:
    """Mixed precision as a trainer uses it: bit-equal to the parent where full, near the float32 model elsewhere."""
    model, ids = tiny(dtype=torch.float32), tokens(40)
    with torch.autocast("cpu", torch.bfloat16):
        parent = logits(model, ids, use_cache=False)
    exact = logits(convert(model, plan), ids, use_cache=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert plan != FULL or torch.equal(out.logits.detach(), parent)
    assert (out.logits - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_positional_arguments() -> None:
    model, ids = convert(tiny(), MIXED), tokens(20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        assert torch.equal(model.model(ids, mask)[0], model.model(input_ids=ids, attention_mask=mask)[0])


def test_return_dict_false() -> None:
    model, ids = convert(tiny(), MIXED), tokens(20)
    with torch.no_grad():
        assert torch.equal(model(ids, return_dict=False)[0], logits(model, ids))


def test_hidden_states() -> None:
    model, ids = convert(tiny(), MIXED), tokens(20)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    assert torch.equal(out.logits, logits(model, ids))


# What it puts back


@pytest.mark.parametrize("family", FEW)
def test_restore_puts_everything_back(family: str) -> None:
    model, ids = tiny(family), tokens(30)
    before, expected = state(model), logits(model, ids)
    assert convert(model, MIXED) is model
    assert is_converted(model)
    assert plan_of(model) == MIXED
    assert isinstance(model, class_of(config_of(family)))
    assert type(model).__name__ == class_of(config_of(family)).__name__
    assert restore(model) is model
    assert not is_converted(model)
    assert type(model) is class_of(config_of(family))
    assert state(model) == before
    assert torch.equal(logits(model, ids), expected)


def test_conversion_leaves_weights_alone() -> None:
    model = tiny()
    before = {name: (x.data_ptr(), x.clone()) for name, x in model.state_dict().items()}
    convert(model, MIXED)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(x.data_ptr() == before[name][0] and torch.equal(x, before[name][1]) for name, x in after.items())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_restore_puts_the_implementation_back(implementation: str) -> None:
    model = tiny()
    model.set_attn_implementation(implementation)
    restore(convert(model, MIXED))
    assert model.config._attn_implementation == implementation


def test_restore_twice() -> None:
    model = restore(convert(tiny(), MIXED))
    with pytest.raises(InputError, match="LlamaForCausalLM is not converted"):
        restore(model)


def test_applied() -> None:
    model, ids = tiny(), tokens(30)
    before, full = state(model), logits(model, ids)
    with applied(model, MIXED) as inside:
        assert inside is model
        assert plan_of(model) == MIXED
        assert (logits(model, ids) - full).abs().max() > 1e-3
    assert state(model) == before


def test_applied_puts_back_after_an_exception() -> None:
    model = tiny()
    before = state(model)
    with pytest.raises(KeyError, match="mine"), applied(model, MIXED):
        raise KeyError("mine")
    assert state(model) == before


def test_applied_inside_a_conversion() -> None:
    model = convert(tiny(), MIXED)
    before = state(model)
    with applied(model, uniform(Window(3))):
        assert plan_of(model) == uniform(Window(3))
        with pytest.raises(ZeroDivisionError), applied(model, FULL):
            raise ZeroDivisionError
        assert plan_of(model) == uniform(Window(3))
    assert plan_of(model) == MIXED
    assert state(model) == before


def test_converting_twice_takes_the_new_plan() -> None:
    model, ids = tiny(), tokens(30)
    before = state(model)
    once = logits(convert(copy.deepcopy(model), MIXED), ids)
    convert(convert(model, uniform(Window(3))), MIXED)
    assert torch.equal(logits(model, ids), once)
    assert state(restore(model)) == before


def test_two_models_have_their_own_spans() -> None:
    one, two, ids = tiny(), tiny(), tokens(30)
    full = logits(one, ids)
    convert(one, MIXED)
    assert torch.equal(logits(two, ids), full)
    convert(two, FULL)
    assert torch.equal(logits(two, ids), full)
    assert (logits(one, ids) - full).abs().max() > 1e-3


def test_deepcopy() -> None:
    model, ids = convert(tiny(), MIXED), tokens(30)
    twin = copy.deepcopy(model)
    expected = logits(model, ids)
    restore(model)
    assert plan_of(twin) == MIXED
    assert torch.equal(logits(twin, ids), expected)


def test_state_dict_and_dtype_moves() -> None:
    model, ids = convert(tiny(), MIXED), tokens(30)
    expected = logits(model, ids)
    other = convert(tiny(seed=1), MIXED)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), expected)
    assert (logits(model.float(), ids) - expected).abs().max() < 1e-4


def test_importing_changes_nothing_in_transformers() -> None:
    """In a fresh interpreter: what transformers' registries held before, they hold after, and one name more."""
    script = """
        import json
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
        from transformers import LlamaForCausalLM, PreTrainedModel, DynamicCache
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        def registries():
            maps = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
            maps += [CONFIG_MAPPING._mapping, CONFIG_MAPPING._extra_content]
            maps += [{k.__name__: v for k, v in MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.items()}]
            return [dict(m) for m in maps]

        def members():
            classes = (LlamaForCausalLM, PreTrainedModel, DynamicCache, AutoModelForCausalLM)
            return [(c.__name__, k, id(v)) for c in classes for k, v in vars(c).items()]

        before, parts = registries(), members()
        import masformer
        import masformer.models.convert, masformer.models.checkpoint, masformer.models.selfcheck
        after = registries()
        changed = [k for b, a in zip(before, after) for k in b if a[k] is not b[k]]
        added = [[k for k in a if k not in b] for b, a in zip(before, after)]
        print(json.dumps([changed, added, parts == members()]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    changed, added, same = json.loads(done.stdout)
    assert changed == []
    assert added == [["masformer"], ["masformer"], [], ["masformer"], ["MasformerConfig"]]
    assert same


# What it refuses


def test_unsupported_family() -> None:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 16, "rotary_dim": 2}
    model = GPTJForCausalLM(GPTJConfig(**sizes, bos_token_id=None, eos_token_id=None))
    before = state(model)
    with pytest.raises(InputError, match=r"model type 'gptj' computes its attention itself.*supported are: apertus, "):
        convert(model, uniform(Window(2), 2))
    assert state(model) == before
    with pytest.raises(InputError, match="'gptj'"):
        plan_of(model)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), None])
def test_not_a_model(model: Any) -> None:
    with pytest.raises(InputError, match="is not a causal language model"):
        convert(model, FULL)


def test_not_a_causal_model() -> None:
    with pytest.raises(InputError, match="LlamaForSequenceClassification is not a causal language model"):
        convert(LlamaForSequenceClassification(config_of("llama", num_labels=2)), FULL)
    with pytest.raises(InputError, match="LlamaModel is not a causal language model"):
        convert(tiny().model, FULL)


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_wrong_number_of_layers(layers: int) -> None:
    model = tiny()
    before = state(model)
    with pytest.raises(PlanError, match=f"the plan has {layers} layers, the model has 4"):
        convert(model, uniform(Window(2), layers))
    assert state(model) == before
    convert(model, MIXED)
    with pytest.raises(PlanError, match=f"the plan has {layers} layers, the model has 4"):
        convert(model, uniform(Window(2), layers))
    assert plan_of(model) == MIXED


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2", "flex_attention", {"": "sdpa"}])
def test_another_attention_implementation(implementation: Any) -> None:
    model, ids = convert(tiny(), MIXED), tokens(9)
    before, expected = state(model), logits(model, ids)
    with pytest.raises(UnsupportedSpan, match="would ignore the spans"):
        model.set_attn_implementation(implementation)
    assert state(model) == before
    assert torch.equal(logits(model, ids), expected)


def test_another_attention_implementation_of_the_decoder() -> None:
    model = convert(tiny(), MIXED)
    model.model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedSpan, match="changed to 'eager'"):
        logits(model, tokens(9))


def test_another_implementation_in_the_config() -> None:
    model = convert(tiny(), MIXED)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(UnsupportedSpan, match="changed to 'sdpa'"):
        logits(model, tokens(9))


def test_the_attention_name_without_conversion() -> None:
    model = tiny()
    model.config._attn_implementation = "masformer"
    with pytest.raises(UnsupportedSpan, match="outside a converted model"):
        logits(model, tokens(9))


def test_continuous_batching() -> None:
    model = convert(tiny(), MIXED)
    with pytest.raises(UnsupportedSpan, match="generate_batch"):
        model.generate_batch([[3, 4, 5]])
    with pytest.raises(UnsupportedSpan, match="continuous batching"):
        model.init_continuous_batching()


def test_static_cache_object() -> None:
    model = convert(tiny(), MIXED)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(UnsupportedSpan, match="StaticCache cannot honour spans"):
        logits(model, tokens(9), past_key_values=cache)
    with pytest.raises(UnsupportedSpan, match="StaticCache cannot honour spans"):
        model.generate(tokens(9), past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["static", "offloaded", "offloaded_static", "quantized", "sliding_window"])
def test_other_caches_by_name(kind: str) -> None:
    model = convert(tiny(), MIXED)
    with pytest.raises(UnsupportedSpan, match=f"cache_implementation='{kind}' cannot honour spans"):
        model.generate(tokens(9), cache_implementation=kind, max_new_tokens=2)


def test_offloaded_cache_object() -> None:
    model = convert(tiny(), MIXED)
    cache = DynamicCache()
    cache.offloading = True  # what DynamicCache(offloading=True) sets, where there is a stream to offload with
    with pytest.raises(UnsupportedSpan, match="offloaded DynamicCache cannot honour spans"):
        logits(model, tokens(9), past_key_values=cache)


def test_mask_over_pairs() -> None:
    model = convert(tiny(), MIXED)
    with pytest.raises(UnsupportedSpan, match=r"attention_mask has shape \(1, 1, 9, 9\)"):
        logits(model, tokens(9), attention_mask=additive_mask(Full(), 9))


def test_masks_by_layer_type() -> None:
    model = convert(tiny(), MIXED)
    with pytest.raises(UnsupportedSpan, match="mask"):
        logits(model, tokens(9), attention_mask={"full_attention": additive_mask(Full(), 9)})


def test_output_attentions() -> None:
    model = convert(tiny(), MIXED)
    with pytest.raises(UnsupportedSpan, match="output_attentions"):
        logits(model, tokens(9), output_attentions=True)
    with pytest.raises(UnsupportedSpan, match="output_attentions"):
        model.generate(tokens(9), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


def test_arguments_of_attention_that_are_not_honoured() -> None:
    model = convert(tiny(), MIXED)
    with pytest.raises(UnsupportedSpan, match="position_bias"):
        logits(model, tokens(9), position_bias=torch.ones(4))


def test_no_input() -> None:
    with pytest.raises(ValueError, match="input_ids"):
        convert(tiny(), MIXED)()
