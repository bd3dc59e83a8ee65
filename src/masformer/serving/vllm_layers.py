"""vLLM's own models with the spans of a plan: each local layer's attention is replaced when the model has been built.

Windows are vLLM's own. Blocks are full attention over requests cut into blocks (`batches.py`), by whatever back end
vLLM has chosen; vLLM's ChunkedLocalAttention (model_executor/layers/attention/chunked_local_attention.py, 0.32.0) does
the same for blocks without lookback. Imported only where vLLM is installed.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata, subclass_attention_backend
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
    get_kv_quant_mode,
)

from ..errors import InputError
from ..files import check_files
from ..spans import Block, Full, Span, SpanPlan, Window
from .batches import block_batches, refuse_unaligned
from .reserved import vllm_span
from .vllm import PLAN


class SpanAttention(Attention):
    """The attention of one local layer, in the place of `replaced`."""

    def __init__(self, span: Span, replaced: Attention, cache_config: Any, quant_config: Any) -> None:
        super().__init__(
            replaced.num_heads,
            replaced.head_size,
            replaced.impl.scale,
            num_kv_heads=replaced.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=span.size if isinstance(span, Window) else None,
            prefix=replaced.layer_name,
            attn_backend=block_backend(replaced.attn_backend, span) if isinstance(span, Block) else None,
        )
        self.span = span

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        """How long keys are held: as long as the span needs them where vLLM can let go of them, else all of them."""
        page = vllm_config.cache_config.block_size
        if isinstance(self.span, Block):
            refuse_unaligned(self.span, page)
        sizes: dict[str, Any] = {
            "block_size": page,
            "num_kv_heads": self.num_kv_heads,
            "head_size": self.head_size,
            "dtype": self.kv_cache_torch_dtype,
            "kv_quant_mode": get_kv_quant_mode(self.kv_cache_dtype),
        }
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            return FullAttentionSpec(**sizes)
        if isinstance(self.span, Window):
            return super().get_kv_cache_spec(vllm_config)
        kept = vllm_span(self.span)
        if isinstance(kept, Window):
            return SlidingWindowSpec(**sizes, sliding_window=kept.size)
        assert isinstance(kept, Block)
        return ChunkedLocalAttentionSpec(**sizes, attention_chunk_size=kept.size)


@functools.lru_cache
def block_backend(backend: Any, span: Block) -> Any:
    """An attention back end of vLLM over requests that are cut into blocks."""

    class BlockBuilder(backend.get_builder_cls()):  # type: ignore[misc]
        @classmethod
        def get_cudagraph_support(cls, *_: Any) -> AttentionCGSupport:
            return AttentionCGSupport.NEVER  # the number of blocks changes from step to step

        def use_cascade_attention(self, *_: Any, **__: Any) -> bool:
            return False  # a prefix that requests share is not what a block sees

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            cut, table = _cut(common_attn_metadata, span, self.kv_cache_spec.block_size)
            metadata = super().build(0, cut, fast_build)
            metadata.cut_table = table
            return metadata

        def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
            updated = super().update_block_table(metadata, metadata.cut_table(blk_table), slot_mapping)
            updated.cut_table = metadata.cut_table
            return updated

    name = f"Blocks{span.size}Lookback{span.lookback}"
    return subclass_attention_backend(name_prefix=name, attention_backend_cls=backend, builder_cls=BlockBuilder)


def _cut(whole: Any, span: Block, page: int) -> tuple[Any, Any]:
    """The metadata of requests cut into blocks, and what makes their block table."""
    with gpu_sync_allowed():
        lengths = whole.seq_lens.cpu().long()
    cut = block_batches(whole.query_start_loc_cpu.long().diff(), lengths, span, page)
    device = whole.query_start_loc.device
    starts, keys = torch.nn.functional.pad(cut.queries.cumsum(0), (1, 0)).int(), cut.keys.int()
    metadata = CommonAttentionMetadata(
        query_start_loc_cpu=starts,
        query_start_loc=starts.to(device),
        seq_lens=keys.to(device),
        num_reqs=len(keys),
        num_actual_tokens=whole.num_actual_tokens,
        max_query_len=int(cut.queries.max()),
        max_seq_len=int(keys.max()),
        block_table_tensor=cut.table(whole.block_table_tensor).contiguous(),
        slot_mapping=whole.slot_mapping,
        causal=True,
        seq_lens_cpu_upper_bound=keys,
    )
    return metadata, cut.table


class Spanned:
    """In front of one of vLLM's models: gives its layers the spans of the config's plan."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        config = vllm_config.model_config
        folder, layers = Path(config.model), config.hf_config.num_hidden_layers
        if folder.is_dir():
            check_files(folder)
        plan = SpanPlan.parse(getattr(config.hf_config, PLAN))
        if len(plan) != layers:
            raise InputError(f"the plan has {len(plan)} layers, the model has {layers}")
        for span in plan:
            vllm_span(span)  # refuses what vLLM cannot compute
        if vllm_config.speculative_config is not None:
            raise InputError("a conversion is not served with speculative decoding: it was never tried")
        parallel = vllm_config.parallel_config
        if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
            raise InputError(
                "blocks and windows are not served with context parallelism: each rank has part of the keys"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        _replace(self, plan, vllm_config)


def _replace(model: Any, plan: SpanPlan, vllm_config: Any) -> None:
    """Put `SpanAttention` where a local layer has vLLM's `Attention`."""
    layers = vllm_config.compilation_config.static_forward_context
    for name, layer in [*layers.items()]:
        if type(layer) is not Attention or layer.sliding_window is not None:
            raise InputError(f"layer {name} of vLLM's model is no plain attention: its span cannot be changed")
        span = plan[extract_layer_index(name)]
        if isinstance(span, Full):
            continue
        del layers[name]
        place, _, attribute = name.rpartition(".")
        new = SpanAttention(span, layer, vllm_config.cache_config, vllm_config.quant_config)
        setattr(model.get_submodule(place), attribute, new)


class MasformerLlamaForCausalLM(Spanned, LlamaForCausalLM):
    """Llama, and Ministral, whose weights and positions are Llama's."""


class MasformerMistralForCausalLM(Spanned, MistralForCausalLM):
    """Mistral."""


class MasformerQwen2ForCausalLM(Spanned, Qwen2ForCausalLM):
    """Qwen 2."""


class MasformerQwen3ForCausalLM(Spanned, Qwen3ForCausalLM):
    """Qwen 3."""
