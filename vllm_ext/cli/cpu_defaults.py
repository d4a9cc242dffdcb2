"""What ``vllm-ext serve`` chooses on CPUs where the user did not, and says so."""

from __future__ import annotations

import os

from attn_backends.methods import REGISTRY, load_method
from vllm_ext.engine_process import cpu_dtype

# The KV pool is really resident, and filling it takes about 3 s per GiB at start.
KV_POOL_BYTES = 2 << 30
KV_POOL_SHARE = 0.1  # of the memory available, where that is more


def default_kv_pool_bytes(rest: list[str]) -> int | None:
    """Size of the KV pool on CPU where the user gave none; None elsewhere."""
    from vllm.platforms import current_platform

    sized_by = (
        "--kv-cache-memory-bytes",
        "--kv-cache-memory",
        "--gpu-memory-utilization",
        "--num-gpu-blocks-override",
    )
    given = [word.split("=")[0].replace("_", "-") for word in rest]
    if not current_platform.is_cpu() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    if any(word in sized_by for word in given):
        return None
    import psutil

    available_bytes = int(psutil.virtual_memory().available)
    wanted = max(KV_POOL_BYTES, int(available_bytes * KV_POOL_SHARE))
    return min(wanted, available_bytes // 2) >> 20 << 20


def default_dtype(rest: list[str]) -> list[str]:
    """``--dtype float32`` on CPUs where bf16 has no instructions, unless the user chose."""
    from vllm.platforms import current_platform

    is_given = any(word.split("=")[0] == "--dtype" for word in rest)
    if is_given or not current_platform.is_cpu() or cpu_dtype() == "auto":
        return []
    print(
        f"vllm-ext: dtype {cpu_dtype()}, since this CPU has no AVX-512 and multiplies bfloat16 "
        "about nine times slower (choose with --dtype)",
        flush=True,
    )
    return ["--dtype", cpu_dtype()]


def method_chunk(backend: str) -> int | None:
    """Tokens of a prompt that the method wants scheduled in one step on CPUs; None: vLLM's choice.

    Args:
        backend: name of the method; another attention backend, or none, wants nothing.
    """
    from vllm.platforms import current_platform

    if backend not in REGISTRY or not current_platform.is_cpu():
        return None
    return load_method(backend).chunk_tokens


def default_chunk(rest: list[str], backend: str) -> list[str]:
    """``--max-num-batched-tokens`` where the method wants another one than vLLM takes, unless the
    user chose.

    Args:
        rest: flags for vLLM.
        backend: see ``method_chunk``.
    """
    flags = {word.split("=")[0].replace("_", "-") for word in rest}
    chunk_tokens = method_chunk(backend)
    if chunk_tokens is None or "--max-num-batched-tokens" in flags:
        return []
    print(
        f"vllm-ext: prompts are read in chunks of {chunk_tokens} tokens, so that {backend} frees "
        "memory early (choose with --max-num-batched-tokens)",
        flush=True,
    )
    return ["--max-num-batched-tokens", str(chunk_tokens)]
