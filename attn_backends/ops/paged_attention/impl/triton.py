"""Triton implementation of ``paged_attention``.

Flash attention over a paged cache: one program serves one tile of query tokens of one
row, with all query heads of one KV head packed into the tile, and walks the KV blocks
with an online softmax in fp32. With a ``SpanRule`` it steps over the blocks that lie
between the sinks and the span of the whole tile, so prefill costs the budget per query
and not the context.

The grid depends on shapes and ``batch.max_query_len`` only; lengths and rules stay on the
device. Hidden tokens are masked at the load, so what their memory holds cannot matter.

Proven in Triton's interpreter; run on an H200 at commit fa7282f (docs/results.md).
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch

from attn_backends.batch import PagedBatch, SpanRule
from attn_backends.ops.dispatch import OpContext

if TYPE_CHECKING:
    import triton
    import triton.language as tl

MAX_BLOCK_SIZE = 128
MAX_HEAD_SIZE = 128
MAX_TILE_ROWS = 64  # (query token, query head) pairs of one program
SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    rule: SpanRule | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """See ``api.py``."""
    if batch.num_reqs == 0 or batch.max_query_len == 0:
        return
    kernel = _kernel()
    _, num_kv_heads, block_size, head_size = key_cache.shape
    group = query.shape[1] // num_kv_heads
    # tl.dot needs 16 rows; more than the longest query fills would be idle.
    wanted_rows = triton.next_power_of_2(min(batch.max_query_len * group, MAX_TILE_ROWS))
    tile_rows = max(16, wanted_rows, triton.next_power_of_2(group))
    num_tiles = triton.cdiv(batch.max_query_len, tile_rows // group)
    interpreted = _interpreted()
    # The interpreter truncates when it converts to bf16; there, torch does the rounding.
    target = out.float() if interpreted else out
    spans = rule.values if rule else batch.block_table  # not read without a rule
    kernel[(num_tiles, num_kv_heads, batch.num_reqs)](
        query,
        key_cache,
        value_cache,
        target,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        spans,
        scale,
        query.stride(0),
        query.stride(1),
        *key_cache.stride(),
        *value_cache.stride(),
        target.stride(0),
        target.stride(1),
        batch.block_table.stride(0),
        *spans.stride()[:2],
        GROUP=group,
        HEAD_SIZE=head_size,
        HEAD_PAD=max(16, triton.next_power_of_2(head_size)),
        BLOCK_SIZE=block_size,
        BLOCK_M=tile_rows,
        BLOCK_N=max(16, triton.next_power_of_2(block_size)),
        HAS_RULE=rule is not None,
        UPCAST=interpreted,
        # Two K and V tiles in flight fit into shared memory in 16 bit, not in fp32.
        num_stages=1 if key_cache.dtype == torch.float32 else 2,
        num_warps=4,
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
        _kernel()
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernel() -> Any:
    """The compiled kernel; the first call imports Triton, so that importing us does not.

    Triton looks names up in the globals of the kernel, hence ``global``.
    """
    global triton, tl
    import triton
    import triton.language as tl

    return triton.jit(_paged_attention_kernel)


def _paged_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_table_ptr,
    spans_ptr,
    scale,
    stride_query_token,
    stride_query_head,
    stride_key_block,
    stride_key_head,
    stride_key_token,
    stride_key_dim,
    stride_value_block,
    stride_value_head,
    stride_value_token,
    stride_value_dim,
    stride_out_token,
    stride_out_head,
    stride_table_row,
    stride_span_row,
    stride_span_head,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_RULE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    TILE_QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    first_token = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - first_token
    first_query = tile * TILE_QUERIES
    if first_query >= query_len:
        return
    seq_len = tl.load(seq_lens_ptr + row)

    tile_rows = tl.arange(0, BLOCK_M)
    queries = first_query + tile_rows // GROUP  # [BLOCK_M], index within the row's queries
    query_heads = kv_head * GROUP + tile_rows % GROUP  # [BLOCK_M]
    # BLOCK_M need not be a multiple of GROUP: the last BLOCK_M % GROUP rows stay idle.
    row_mask = (tile_rows < TILE_QUERIES * GROUP) & (queries < query_len)
    positions = seq_len - query_len + queries  # [BLOCK_M]
    first_position = seq_len - query_len + first_query
    last_position = tl.minimum(first_position + TILE_QUERIES, seq_len) - 1

    dims = tl.arange(0, HEAD_PAD)
    dim_mask = dims < HEAD_SIZE
    query_tokens = (first_token + queries).to(tl.int64)
    query_tile = tl.load(  # [BLOCK_M, HEAD_PAD]
        query_ptr
        + query_tokens[:, None] * stride_query_token
        + query_heads[:, None] * stride_query_head
        + dims[None, :],
        mask=row_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )
    if UPCAST:  # the interpreter's bf16 dot is wrong
        query_tile = query_tile.to(tl.float32)

    num_steps = (last_position + BLOCK_SIZE) // BLOCK_SIZE
    if HAS_RULE:
        span_ptr = spans_ptr + row * stride_span_row + kv_head * stride_span_head
        sink_tokens = tl.load(span_ptr)
        floor_tokens = tl.load(span_ptr + 1)
        alpha_tokens = tl.load(span_ptr + 2)
        beta_64ths = tl.load(span_ptr + 3)
        elastic = alpha_tokens + beta_64ths * (positions + 1) // 64
        first_seen = positions + 1 - tl.maximum(floor_tokens, elastic)  # [BLOCK_M], sinks apart
        # What a query sees first never falls, so the tile's first query bounds the gap: what
        # lies between the sinks and its span is hidden from every query of the tile.
        elastic = alpha_tokens + beta_64ths * (first_position + 1) // 64
        tile_first_seen = first_position + 1 - tl.maximum(floor_tokens, elastic)
        window_block = tl.maximum(tile_first_seen, 0) // BLOCK_SIZE
        num_sink_blocks = tl.minimum((sink_tokens + BLOCK_SIZE - 1) // BLOCK_SIZE, num_steps)
        gap = tl.maximum(window_block - num_sink_blocks, 0)
        num_steps -= gap

    running_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], dtype=tl.float32)
    offsets = tl.arange(0, BLOCK_N)
    for step in range(0, num_steps):
        logical_block = step
        if HAS_RULE:
            logical_block = tl.where(step < num_sink_blocks, step, step + gap)
        tokens = logical_block * BLOCK_SIZE + offsets  # [BLOCK_N]
        # Loaded is what at least one query of the tile sees: 0 * NaN would be NaN.
        token_mask = (offsets < BLOCK_SIZE) & (tokens <= last_position)
        visible = tokens[None, :] <= positions[:, None]  # [BLOCK_M, BLOCK_N]
        if HAS_RULE:
            is_sink = tokens < sink_tokens
            token_mask = token_mask & (is_sink | (tokens >= tile_first_seen))
            visible = visible & (is_sink[None, :] | (tokens[None, :] >= first_seen[:, None]))
        visible = visible & token_mask[None, :]

        physical_block = tl.load(
            block_table_ptr + row.to(tl.int64) * stride_table_row + logical_block
        ).to(tl.int64)
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
        logits = tl.where(visible, logits, float("-inf"))  # [BLOCK_M, BLOCK_N]
        new_max = tl.maximum(running_max, tl.max(logits, axis=1))
        # A query that has seen nothing yet has -inf here, and -inf - -inf is NaN.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp(logits - safe_max[:, None])
        rescale = tl.exp(running_max - safe_max)
        running_sum = running_sum * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc, input_precision="ieee")
        running_max = new_max

    # Rows of padded batches have no token to attend: zeros, as in the reference.
    result = acc / tl.where(running_sum == 0.0, 1.0, running_sum)[:, None]
    tl.store(
        out_ptr
        + query_tokens[:, None] * stride_out_token
        + query_heads[:, None] * stride_out_head
        + dims[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & dim_mask[None, :],
    )
