"""vLLM's CUDA kernels: FlashAttention, in the version that vLLM itself would choose, and its cache
writer. Read from the sources of vLLM 0.32 and of its FlashAttention fork; not run on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from attn_backends.adapter.engine_ops.per_batch import PerBatch
from attn_backends.batch import PagedBatch, SpanRule
from attn_backends.near_far import NearFar
from attn_backends.ops.dispatch import OpContext, OpImpl
from kvcache.layout import KVOrder
from kvcache.spans import everything

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256
PAGE_TOKENS = 16  # FlashAttention's pages are a multiple of it
MERGING_VERSIONS = (2, 3)  # what 4 gives for rows without keys was not read


class FlashAttention:
    """Prefill rows and dense decode rows over the fused cache as it is.

    Launches depend on shapes and on the batch's host numbers alone, so that they may be captured;
    FlashAttention 3 then plans splits on the device, within its heuristics' bound. A page may lie
    in the cache with any strides: both halves of a fused tile are pages.

    What a window hides at the edge of a tile is loaded and weighs exactly 0, as in vLLM's own
    sliding-window layers; like those it counts on finite memory there, which blocks that were
    freed have: the table then names the null block, and that is never written.
    """

    def __init__(self) -> None:
        self._cut: PerBatch[NearFar] = PerBatch()
        self._versions: dict[int, int | None] = {}  # by head size

    def attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        rule: SpanRule | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """See ``attn_backends/ops/paged_attention/api.py``.

        Raises:
            ValueError: a rule whose span is not known on the host, or grows.
        """
        if batch.num_reqs == 0 or batch.num_tokens == 0:
            return
        span = everything() if rule is None else rule.span
        if span is None or span.window_tokens is None:
            raise ValueError(f"FlashAttention has one window for all heads and rows, not {rule}")
        launch = self._launcher(query, key_cache, value_cache, scale)
        hides = span.sink_tokens + span.window_tokens < batch.max_seq_len
        if hides and span.sink_tokens:
            self._attend_apart(launch, batch, span.sink_tokens, span.window_tokens, out)
            return
        launch(
            cu_seqlens_q=batch.query_start_loc,
            block_table=batch.block_table,
            seqused_k=batch.seq_lens,
            max_seqlen_q=_max_query_len(batch),
            max_seqlen_k=batch.max_seq_len,
            causal=True,
            window_size=[span.window_tokens - 1, 0] if hides else None,
            out=out,
        )

    def _attend_apart(
        self,
        launch: Any,
        batch: PagedBatch,
        sink_tokens: int,
        window_tokens: int,
        out: torch.Tensor,
    ) -> None:
        """Sinks and window, see ``near_far.py``: rows without keys give 0 and no weight."""
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        reach = (sink_tokens, window_tokens)
        rows = self._cut.get(batch, reach, lambda: NearFar.of(batch, *reach))
        launch = functools.partial(
            launch,
            cu_seqlens_q=rows.query_start_loc,
            block_table=rows.block_table,
            max_seqlen_q=_max_query_len(batch),
        )
        windowed, windowed_lse = launch(
            seqused_k=rows.far_keys,
            max_seqlen_k=batch.max_seq_len,
            causal=True,
            window_size=[window_tokens - 1, 0],  # keys before a query's own, and after
            return_softmax_lse=True,
        )
        sinks, sinks_lse = launch(
            seqused_k=rows.sink_keys,
            max_seqlen_k=sink_tokens,
            causal=False,
            return_softmax_lse=True,
        )
        merge_attn_states(out, sinks, sinks_lse, windowed, windowed_lse)
        near = launch(seqused_k=rows.near_keys, max_seqlen_k=sum(reach), causal=True)
        out.add_(near)  # exact: one of both is 0

    def decode(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """See ``attn_backends/ops/dense_decode/api.py``."""
        if batch.num_reqs == 0:
            return
        self._launcher(query, key_cache, value_cache, scale)(
            cu_seqlens_q=batch.query_start_loc,
            block_table=batch.block_table,
            seqused_k=batch.seq_lens,
            max_seqlen_q=1,
            max_seqlen_k=batch.max_seq_len,
            causal=True,
            out=out,
        )

    def _launcher(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        scale: float,
    ) -> Any:
        """vLLM's function with all that the launches of one call share."""
        from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        # One KV head leaves a stride that TMA refuses: vLLM's own backend mends it so.
        keys, values = (
            canonicalize_singleton_dim_strides(cache.transpose(1, 2))
            for cache in (key_cache, value_cache)
        )
        return functools.partial(
            flash_attn_varlen_func,
            q=query,
            k=keys,
            v=values,
            softmax_scale=scale,
            fa_version=self._version(query.shape[2]),
        )

    def _version(self, head_size: int) -> int | None:
        """The version that vLLM would choose, or None. Asked first when ops are resolved, while
        vLLM's configuration is set: it may name one.
        """
        if head_size not in self._versions:
            self._versions[head_size] = _version_for(head_size)
        return self._versions[head_size]

    def unsupported_reason(self, context: OpContext) -> str | None:
        """See ``OpImpl``."""
        layout = context.layout
        if reason := _unsupported_cache(context):
            return reason
        if layout.head_size > MAX_HEAD_SIZE:
            return f"head_size {layout.head_size} is more than {MAX_HEAD_SIZE}"
        if layout.block_size % PAGE_TOKENS:
            return f"block_size {layout.block_size} is not a multiple of {PAGE_TOKENS}"
        if context.with_rule and not context.has_plain_windows:
            return "its window is one for all heads of a layer, the same at every position"
        version = self._version(layout.head_size)
        if version is None:
            return "vLLM has no FlashAttention for this device"
        if context.with_rule and version not in MERGING_VERSIONS:
            return f"FlashAttention {version} is not known to merge sinks and a window"
        return None


def _max_query_len(batch: PagedBatch) -> int:
    # At 1, FlashAttention 2 takes it that every row has exactly one query: rows may be empty here.
    return max(batch.max_query_len, 2)


def _version_for(head_size: int) -> int | None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    if not current_platform.has_device_capability(80):
        return None  # asked all the same, vLLM would log an error
    version: int | None = get_flash_attn_version(head_size=head_size)
    return version


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See ``attn_backends/ops/cache_write/api.py``.

    vLLM's kernel takes one set of strides for both caches, which halves of one tile have, and
    tokens whose heads are contiguous, which is how layers are given them. It moves values as they
    are and skips negative slots.
    """
    if slot_mapping.shape[0] == 0:
        return
    from vllm._custom_ops import reshape_and_cache_flash

    scale = _unit_scale(key.device)
    caches = (key_cache.transpose(1, 2), value_cache.transpose(1, 2))
    reshape_and_cache_flash(key, value, *caches, slot_mapping, "auto", scale, scale)


@functools.cache
def _unit_scale(device: torch.device) -> torch.Tensor:
    """What the writer wants to be given for quantised caches, and does not read for others."""
    return torch.ones(1, dtype=torch.float32, device=device)


def _unsupported_cache(context: OpContext) -> str | None:
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return "vLLM was built for another device"
    if context.layout.dtype not in DTYPES:
        return f"KV cache dtype {context.layout.dtype} is not one of bfloat16, float16"
    if context.layout.order is not KVOrder.FUSED:
        return "needs the FUSED cache order"
    return None


def implementations() -> list[OpImpl]:
    """Prefill, dense decode rows and the cache writer; fp32 is left to our own kernels."""
    flash = FlashAttention()
    return [
        OpImpl("cache_write", "engine", write, _unsupported_cache),
        OpImpl("paged_attention", "engine", flash.attend, flash.unsupported_reason),
        OpImpl("dense_decode", "engine", flash.decode, flash.unsupported_reason),
    ]
