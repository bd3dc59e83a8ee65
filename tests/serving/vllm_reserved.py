"""What vLLM's own functions reserve for plans; run by the interpreter of .venv-vllm, no engine is started.

    python vllm_reserved.py '[{"spans": [["full"], ["window", 512]], "length": 8192, ...}]'

Prints a JSON list, one object per case: what vLLM says with the hybrid KV cache manager on and with it off.
"""

import json
import sys
from types import SimpleNamespace

import torch
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.core.kv_cache_utils import _max_memory_usage_bytes_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout


def config(case, disabled):
    """What the functions read of a VllmConfig."""
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=case["length"], hf_text_config=SimpleNamespace()),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=disabled),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout[case["layout"]]),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        max_in_flight_tokens=case["in_flight"],
    )


def specs(case):
    sizes = {
        "block_size": case["page"],
        "num_kv_heads": case["kv_heads"],
        "head_size": case["head_dim"],
        "dtype": torch.bfloat16,
    }
    make = {
        "full": lambda: FullAttentionSpec(**sizes),
        "window": lambda size: SlidingWindowSpec(**sizes, sliding_window=size),
        "block": lambda size: ChunkedLocalAttentionSpec(**sizes, attention_chunk_size=size),
    }
    return {f"layer.{i}": make[kind](*size) for i, (kind, *size) in enumerate(case["spans"])}


def reserved(case, disabled):
    settings = config(case, disabled)
    try:
        groups = get_kv_cache_groups(settings, specs(case))
        total = _max_memory_usage_bytes_from_groups(settings, groups)
    except ValueError as error:
        return {"refused": str(error)}
    pages = [group.kv_cache_spec.max_memory_usage_bytes(settings) for group in groups]
    page = {group.kv_cache_spec.page_size_bytes for group in groups}
    layers = max(len(group.layer_names) for group in groups)
    return {"bytes": total, "layers": layers, "blocks": sum(pages) // page.pop(), "page_sizes": 1 + len(page)}


def defaults():
    """What decides which defaults hold; on this machine those of a CPU."""
    batched, _ = EngineArgs.get_batch_defaults(1)
    return {
        "version": vllm.__version__,
        "cpu": current_platform.is_cpu(),
        "hybrid": current_platform.support_hybrid_kv_cache(),
        "batched": batched[UsageContext.OPENAI_API_SERVER],
        "chunked_allowed": vllm.envs.VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE,
    }


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    found = [{"on": reserved(case, False), "off": reserved(case, True)} for case in cases]
    print(json.dumps({"defaults": defaults(), "found": found}))
