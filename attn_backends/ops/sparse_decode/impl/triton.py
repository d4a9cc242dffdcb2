"""Triton implementation of ``sparse_decode``.

Split-KV decoding in two kernels. The first runs one program per (row, KV head, split of
the row's selected blocks); all query heads of the KV head share the loaded tiles, and the
split's maximum, sum and unnormalised output go to an fp32 workspace. The second merges
the splits of a (row, query head) in one fixed-shape reduction.

How a row is split and merged depends on its own number of selected blocks alone, so a
request's bits do not depend on its neighbours. The grids depend on shapes alone; counts
and lengths stay on the device, where programs without work leave early. Hidden tokens
are masked at the load, so what their memory holds cannot matter.

Proven in Triton's interpreter; run on an H200 at commit fa7282f (docs/results.md).
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch

from attn_backends.batch import BlockSelection, PagedBatch, SpanRule
from attn_backends.ops.dispatch import OpContext

if TYPE_CHECKING:
    import triton
    import triton.language as tl

MAX_BLOCK_SIZE = 128
MAX_HEAD_SIZE = 128
MAX_SPLITS = 32  # bounds the workspace and fixes the shape of the merge
MIN_SPLIT_TOKENS = 256  # below that, a program's start costs more than its loads
SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    selection: BlockSelection,
    rule: SpanRule | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """See ``api.py``."""
    if batch.num_reqs == 0:
        return
    partial_kernel, merge_kernel = _kernels()
    _, num_kv_heads, block_size, head_size = key_cache.shape
    num_query_heads = query.shape[1]
    group = num_query_heads // num_kv_heads
    min_split_blocks = max(1, MIN_SPLIT_TOKENS // block_size)
    max_selected = selection.logical_blocks.shape[2]
    num_splits = min(MAX_SPLITS, triton.cdiv(max_selected, min_split_blocks))
    partials = (batch.num_reqs, num_query_heads, num_splits)
    partial_out = query.new_empty((*partials, head_size), dtype=torch.float32)
    partial_max = query.new_empty(partials, dtype=torch.float32)
    partial_sum = query.new_empty(partials, dtype=torch.float32)
    interpreted = _interpreted()
    spans = rule.values if rule else selection.counts  # not read without a rule
    sizes = {
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "HEAD_PAD": max(16, triton.next_power_of_2(head_size)),
        "MIN_SPLIT_BLOCKS": min_split_blocks,
        "MAX_SPLITS": MAX_SPLITS,
        "num_warps": 4,
    }
    partial_kernel[(batch.num_reqs, num_kv_heads, num_splits)](
        query,
        key_cache,
        value_cache,
        partial_out,
        partial_max,
        partial_sum,
        batch.seq_lens,
        batch.block_table,
        selection.logical_blocks,
        selection.counts,
        spans,
        scale,
        query.stride(0),
        query.stride(1),
        *key_cache.stride(),
        *value_cache.stride(),
        partial_sum.stride(0),
        partial_sum.stride(1),
        batch.block_table.stride(0),
        *selection.logical_blocks.stride()[:2],
        *selection.counts.stride(),
        *spans.stride()[:2],
        GROUP_PAD=max(16, triton.next_power_of_2(group)),  # tl.dot needs 16 rows
        BLOCK_SIZE=block_size,
        BLOCK_N=max(16, triton.next_power_of_2(block_size)),
        HAS_RULE=rule is not None,
        UPCAST=interpreted,
        # Two K and V tiles in flight fit into shared memory in 16 bit, not in fp32.
        num_stages=1 if key_cache.dtype == torch.float32 else 2,
        **sizes,
    )
    # The interpreter truncates when it converts to bf16; there, torch does the rounding.
    target = out.float() if interpreted else out
    merge_kernel[(batch.num_reqs, num_query_heads)](
        partial_out,
        partial_max,
        partial_sum,
        target,
        selection.counts,
        partial_sum.stride(0),
        partial_sum.stride(1),
        *selection.counts.stride(),
        target.stride(0),
        target.stride(1),
        **sizes,
    )
    if interpreted:
        out.copy_(target)


def unsupported_reason(context: OpContext) -> str | None:
    """Sizes that were tested, wherever Triton runs."""
    if context.device_type == "cpu" and not _interpreted():
        return "Triton does not run on CPU (TRITON_INTERPRET=1 runs its slow interpreter)"
    layout = context.layout
    if layout.head_size > MAX_HEAD_SIZE:
        return f"head_size {layout.head_size} is more than {MAX_HEAD_SIZE}"
    if layout.block_size > MAX_BLOCK_SIZE:
        return f"block_size {layout.block_size} is more than {MAX_BLOCK_SIZE}"
    if layout.dtype not in SUPPORTED_DTYPES:
        return f"KV cache dtype {layout.dtype} is not one of bfloat16, float16, float32"
    try:
        _kernels()
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """Both compiled kernels; the first call imports Triton, so that importing us does not.

    Triton looks names up in the globals of the kernels, hence ``global``.
    """
    global triton, tl
    import triton
    import triton.language as tl

    return triton.jit(_partial_kernel), triton.jit(_merge_kernel)


def _partial_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    partial_out_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    seq_lens_ptr,
    block_table_ptr,
    logical_blocks_ptr,
    counts_ptr,
    spans_ptr,
    scale,
    stride_query_row,
    stride_query_head,
    stride_key_block,
    stride_key_head,
    stride_key_token,
    stride_key_dim,
    stride_value_block,
    stride_value_head,
    stride_value_token,
    stride_value_dim,
    stride_partial_row,
    stride_partial_head,
    stride_table_row,
    stride_logical_row,
    stride_logical_head,
    stride_count_row,
    stride_count_head,
    stride_span_row,
    stride_span_head,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT_BLOCKS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_RULE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Rows times blocks, heads or splits overflow int32 in large caches.
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    count = tl.load(counts_ptr + row * stride_count_row + kv_head * stride_count_head)
    split_blocks = tl.maximum((count + MAX_SPLITS - 1) // MAX_SPLITS, MIN_SPLIT_BLOCKS)
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, count)
    if first >= last:
        return
    seq_len = tl.load(seq_lens_ptr + row)

    group_rows = tl.arange(0, GROUP_PAD)
    group_mask = group_rows < GROUP
    query_heads = kv_head * GROUP + group_rows  # [GROUP_PAD]
    dims = tl.arange(0, HEAD_PAD)
    dim_mask = dims < HEAD_SIZE
    query_tile = tl.load(  # [GROUP_PAD, HEAD_PAD]
        query_ptr
        + row * stride_query_row
        + query_heads[:, None] * stride_query_head
        + dims[None, :],
        mask=group_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )
    if UPCAST:  # the interpreter's bf16 dot is wrong
        query_tile = query_tile.to(tl.float32)
    if HAS_RULE:
        span_ptr = spans_ptr + row * stride_span_row + kv_head * stride_span_head
        sink_tokens = tl.load(span_ptr)
        elastic = tl.load(span_ptr + 2) + tl.load(span_ptr + 3) * seq_len // 64
        first_seen = seq_len - tl.maximum(tl.load(span_ptr + 1), elastic)  # sinks apart

    running_max = tl.full([GROUP_PAD], float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros([GROUP_PAD], dtype=tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], dtype=tl.float32)
    offsets = tl.arange(0, BLOCK_N)
    logical_row_ptr = logical_blocks_ptr + row * stride_logical_row + kv_head * stride_logical_head
    for index in range(first, last):
        logical_block = tl.load(logical_row_ptr + index)
        physical_block = tl.load(block_table_ptr + row * stride_table_row + logical_block).to(
            tl.int64
        )
        tokens = logical_block * BLOCK_SIZE + offsets  # [BLOCK_N]
        # Masked at the load and not only in the logits: 0 * NaN would be NaN.
        token_mask = (offsets < BLOCK_SIZE) & (tokens < seq_len)
        if HAS_RULE:
            token_mask = token_mask & ((tokens < sink_tokens) | (tokens >= first_seen))
        key_tile = tl.load(  # [HEAD_PAD, BLOCK_N]
            key_ptr
            + physical_block * stride_key_block
            + kv_head * stride_key_head
            + dims[:, None] * stride_key_dim
            + offsets[None, :] * stride_key_token,
            mask=dim_mask[:, None] & token_mask[None, :],
            other=0.0,
        )
        value_tile = tl.load(  # [BLOCK_N, HEAD_PAD]
            value_ptr
            + physical_block * stride_value_block
            + kv_head * stride_value_head
            + offsets[:, None] * stride_value_token
            + dims[None, :] * stride_value_dim,
            mask=token_mask[:, None] & dim_mask[None, :],
            other=0.0,
        )
        if UPCAST:
            key_tile = key_tile.to(tl.float32)
            value_tile = value_tile.to(tl.float32)

        logits = tl.dot(query_tile, key_tile, input_precision="ieee") * scale
        logits = tl.where(token_mask[None, :], logits, float("-inf"))  # [GROUP_PAD, BLOCK_N]
        new_max = tl.maximum(running_max, tl.max(logits, axis=1))
        # While the rule has hidden everything so far this is -inf, and -inf - -inf is NaN.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp(logits - safe_max[:, None])
        rescale = tl.exp(running_max - safe_max)
        running_sum = running_sum * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc, input_precision="ieee")
        running_max = new_max

    # [GROUP_PAD], index into [num_reqs, num_query_heads, num_splits]
    partials = row * stride_partial_row + query_heads * stride_partial_head + split
    tl.store(partial_max_ptr + partials, running_max, mask=group_mask)
    tl.store(partial_sum_ptr + partials, running_sum, mask=group_mask)
    tl.store(
        partial_out_ptr + partials[:, None] * HEAD_SIZE + dims[None, :],
        acc,
        mask=group_mask[:, None] & dim_mask[None, :],
    )


def _merge_kernel(
    partial_out_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    out_ptr,
    counts_ptr,
    stride_partial_row,
    stride_partial_head,
    stride_count_row,
    stride_count_head,
    stride_out_row,
    stride_out_head,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    MIN_SPLIT_BLOCKS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    query_head = tl.program_id(1)
    kv_head = query_head // GROUP
    count = tl.load(counts_ptr + row * stride_count_row + kv_head * stride_count_head)
    split_blocks = tl.maximum((count + MAX_SPLITS - 1) // MAX_SPLITS, MIN_SPLIT_BLOCKS)
    num_splits = (count + split_blocks - 1) // split_blocks

    # Always MAX_SPLITS wide: the order of summation must not follow the batch's width.
    splits = tl.arange(0, MAX_SPLITS)
    split_mask = splits < num_splits
    dims = tl.arange(0, HEAD_PAD)
    dim_mask = dims < HEAD_SIZE
    partials = row * stride_partial_row + query_head * stride_partial_head + splits
    maxima = tl.load(partial_max_ptr + partials, mask=split_mask, other=float("-inf"))
    sums = tl.load(partial_sum_ptr + partials, mask=split_mask, other=0.0)
    outs = tl.load(  # [MAX_SPLITS, HEAD_PAD]
        partial_out_ptr + partials[:, None] * HEAD_SIZE + dims[None, :],
        mask=split_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )
    row_max = tl.max(maxima, axis=0)
    # A row without any block, as in padded batches, gives zeros as in the reference.
    safe_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    rescale = tl.exp(maxima - safe_max)  # [MAX_SPLITS]
    total = tl.sum(sums * rescale, axis=0)
    result = tl.sum(outs * rescale[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out_ptr + row * stride_out_row + query_head * stride_out_head + dims,
        result.to(out_ptr.dtype.element_ty),
        mask=dim_mask,
    )
