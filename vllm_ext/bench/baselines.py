"""Dense attention by others, which ``vllm-ext bench kernel`` compares with.

On CPUs that is vLLM's own kernel; on GPUs vLLM's FlashAttention over our cache as it is, torch's
and xformers'.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

from attn_backends.adapter import engine_ops
from attn_backends.batch import PagedBatch, SpanRule
from attn_backends.ops.dispatch import OpContext, OpImpl
from vllm_ext.bench.workloads import BatchSpec


def engine_kernels(op: str, device_type: str) -> list[OpImpl]:
    """What the engine itself has for an op."""
    return [impl for impl in engine_ops.implementations(device_type) if impl.op == op]


def dense_baselines(spec: BatchSpec, device_type: str) -> list[OpImpl]:
    """The baselines of a device, as implementations of ``paged_attention``."""
    if device_type == "cpu":
        return engine_kernels("paged_attention", device_type)
    has_xformers = importlib.util.find_spec("xformers") is not None
    missing = None if has_xformers else "xformers is not installed"
    return [
        _flash_attention(device_type),
        _contiguous("sdpa", sdpa, spec, None),
        _contiguous("xformers", xformers, spec, missing),
    ]


def _flash_attention(device_type: str) -> OpImpl:
    """FlashAttention over our cache as it is, launched for one query per row where there is one,
    as vLLM does.
    """
    (prefill,) = engine_kernels("paged_attention", device_type)
    (decode,) = engine_kernels("dense_decode", device_type)

    def run(
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        rule: SpanRule | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        if batch.max_query_len == 1:
            decode.run(query, key_cache, value_cache, batch, scale, out)
        else:
            prefill.run(query, key_cache, value_cache, batch, rule, scale, out)

    return OpImpl("paged_attention", "flash_attn", run, prefill.unsupported_reason)


def _contiguous(
    name: str, attend: Callable[..., torch.Tensor], spec: BatchSpec, missing: str | None
) -> OpImpl:
    contexts = {row.context_tokens for row in spec.rows}
    is_equal = len(contexts) == 1 and spec.num_decode == len(spec.rows)

    def unsupported_reason(context: OpContext) -> str | None:
        return missing if is_equal else "needs decode rows of equal length"

    return OpImpl("paged_attention", name, ContiguousAttention(attend).run, unsupported_reason)


class ContiguousAttention:
    """A dense kernel that knows no pages, for decode rows of equal length.

    Every cache is gathered once, in the warm-up, and that is not timed: the figures favour
    the baseline. ``attend(query, keys, values, scale)`` takes ``[rows, query_heads, 1,
    head_size]`` and ``[rows, kv_heads, tokens, head_size]`` and returns the like of query.
    """

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        self._attend = attend
        self._gathered: dict[int, list[torch.Tensor]] = {}

    def run(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        rule: SpanRule | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """See ``attn_backends/ops/paged_attention/api.py``; ``rule`` must be None."""
        address = key_cache.data_ptr()
        if address not in self._gathered:
            blocks = batch.block_table.long()
            self._gathered[address] = [
                cache[blocks].transpose(1, 2).flatten(2, 3)[:, :, : batch.max_seq_len].contiguous()
                for cache in (key_cache, value_cache)
            ]
        out.copy_(self._attend(query.unsqueeze(2), *self._gathered[address], scale).squeeze(2))


def sdpa(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """torch's; see ``ContiguousAttention``."""
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(query, keys, values, scale=scale, enable_gqa=True)


def xformers(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """xformers' memory-efficient attention; see ``ContiguousAttention``."""
    ops = importlib.import_module("xformers.ops")
    rows, query_heads, _, head_size = query.shape
    # Its layout is [rows, tokens, kv_heads, group, head_size]; keys are expanded, not copied.
    grouped = query.view(rows, 1, keys.shape[1], -1, head_size)
    shape = (-1, -1, -1, grouped.shape[3], -1)
    keys, values = (cache.transpose(1, 2).unsqueeze(3).expand(shape) for cache in (keys, values))
    out: torch.Tensor = ops.memory_efficient_attention(grouped, keys, values, scale=scale)
    return out.view(rows, query_heads, 1, head_size)
