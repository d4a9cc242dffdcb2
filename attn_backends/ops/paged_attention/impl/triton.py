"""Triton implementation of ``paged_attention``.

Flash attention over a paged cache: one program serves one tile of query tokens of one row, with all
query heads of one KV head packed into the tile, and walks tiles of tokens with an online softmax in
fp32. Tokens are gathered through a vector of block ids, so the size of a KV block does not matter.
With a ``SpanRule`` it steps over the tiles that lie between the sinks and the span of the whole
tile of queries, so prefill costs the budget per query and not the context.

The grid depends on shapes and ``batch.max_query_len`` only; lengths and rules stay on the device.
Hidden tokens are masked at the load, so what their memory holds cannot matter.

A tile is laid over blocks padded to a power of two: lane ``x`` is token ``x % BLOCK_PAD`` of the
row's block ``x // BLOCK_PAD``.

Proven in Triton's interpreter and compiled for sm_80 and sm_90 without a device; this version has
not run on a GPU (its predecessor has: docs/results.md).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from attn_backends.batch import PagedBatch, SpanRule
from attn_backends.ops import triton_support as support
from attn_backends.ops.dispatch import OpContext
from attn_backends.ops.triton_support import Launch

if TYPE_CHECKING:
    import triton.language as tl

# (query token, query head) pairs of one program, and keys or values of one of its steps: more do not
# fit into registers beside one another. Tensor cores do not take fp32.
MAX_TILE_ROWS = 128
MAX_TILE_ROWS_OF_WIDE_HEADS = 64
MAX_TILE_ROWS_OF_FP32 = 32
MAX_TILE_ELEMENTS = 8192
WIDE_HEAD_SIZE = 129


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
    shared_bytes = support.shared_bytes_of(query)
    caches = (key_cache, value_cache)
    with support.rounded(out) as target:
        support.start(
            _kernels(), launches(query, *caches, batch, rule, scale, target, shared_bytes)
        )


def launches(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    rule: SpanRule | None,
    scale: float,
    out: torch.Tensor,
    shared_bytes: int,
) -> list[Launch]:
    """What ``run`` launches on a card with that much shared memory; see ``api.py``."""
    support.check_heads_are_contiguous(query, out)
    _, num_kv_heads, block_size, head_size = key_cache.shape
    group = query.shape[1] // num_kv_heads
    head_pad, dtype = support.padded_head(head_size), key_cache.dtype
    max_rows = MAX_TILE_ROWS_OF_WIDE_HEADS if head_size >= WIDE_HEAD_SIZE else MAX_TILE_ROWS
    if dtype == torch.float32:
        max_rows = MAX_TILE_ROWS_OF_FP32
    # tl.dot needs 16 rows; more than the longest query fills would be idle.
    wanted_rows = support.power_of_two(min(batch.max_query_len * group, max_rows))
    tile_rows = max(16, wanted_rows, support.power_of_two(group))
    num_tiles = -(-batch.max_query_len // (tile_rows // group))
    query_bytes = tile_rows * head_pad * dtype.itemsize
    tile = support.tile_of(head_size, dtype, 2, shared_bytes, query_bytes)
    launch = Launch(
        "_paged_attention_kernel",
        (num_tiles, num_kv_heads, batch.num_reqs),
        (
            query,
            key_cache,
            value_cache,
            out,
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_table,
            batch.block_table if rule is None else rule.values,  # not read without a rule
            scale,
            query.stride(0),
            out.stride(0),
            batch.block_table.stride(0),
        ),
        {
            "GROUP": group,
            "HEAD_SIZE": head_size,
            "HEAD_PAD": head_pad,
            "BLOCK_SIZE": block_size,
            "BLOCK_PAD": support.power_of_two(block_size),
            **support.cache_strides(key_cache, value_cache),
            "TILE_ROWS": tile_rows,
            "TILE": min(tile.tokens, MAX_TILE_ELEMENTS // head_pad),
            "NUM_SPANS": 0 if rule is None else rule.values.shape[2],
            "UPCAST": support.interpreted(),
        },
        num_warps=8 if tile_rows > 64 or head_size >= WIDE_HEAD_SIZE else 4,
        num_stages=tile.num_stages,
    )
    return [launch]


def unsupported_reason(context: OpContext) -> str | None:
    """Head sizes and dtypes that were tested, wherever Triton runs."""
    return support.unsupported_reason(context, _kernels)


@functools.cache
def _kernels() -> dict[str, Any]:
    """The compiled kernel; the first call imports Triton, so that importing us does not.

    Triton looks names up in the globals of the kernels, hence ``global``.
    """
    global tl
    import triton
    import triton.language as tl

    return {"_paged_attention_kernel": triton.jit(_paged_attention_kernel)}


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
    stride_out_token,
    stride_table_row,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    STRIDE_KEY_BLOCK: tl.constexpr,
    STRIDE_KEY_HEAD: tl.constexpr,
    STRIDE_KEY_TOKEN: tl.constexpr,
    STRIDE_KEY_DIM: tl.constexpr,
    STRIDE_VALUE_BLOCK: tl.constexpr,
    STRIDE_VALUE_HEAD: tl.constexpr,
    STRIDE_VALUE_TOKEN: tl.constexpr,
    STRIDE_VALUE_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPANS: tl.constexpr,  # of a KV head; 0: no rule
    UPCAST: tl.constexpr,
):
    TILE_QUERIES: tl.constexpr = TILE_ROWS // GROUP
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    first_token = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - first_token
    first_query = tl.program_id(0) * TILE_QUERIES
    if first_query >= query_len:
        return
    seq_len = tl.load(seq_lens_ptr + row)

    tile_rows = tl.arange(0, TILE_ROWS)
    queries = first_query + tile_rows // GROUP  # [TILE_ROWS], index within the row's queries
    query_heads = kv_head * GROUP + tile_rows % GROUP  # [TILE_ROWS]
    # TILE_ROWS need not be a multiple of GROUP: the last TILE_ROWS % GROUP rows stay idle.
    row_mask = (tile_rows < TILE_QUERIES * GROUP) & (queries < query_len)
    positions = seq_len - query_len + queries  # [TILE_ROWS]
    first_position = seq_len - query_len + first_query
    last_position = tl.minimum(first_position + TILE_QUERIES, seq_len) - 1

    dims = tl.arange(0, HEAD_PAD)
    dim_mask = dims < HEAD_SIZE
    query_tokens = (first_token + queries).to(tl.int64)
    query_tile = tl.load(  # [TILE_ROWS, HEAD_PAD]
        query_ptr
        + (query_tokens * stride_query_token + query_heads * HEAD_SIZE)[:, None]
        + dims[None, :],
        mask=row_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )
    if UPCAST:  # the interpreter's bf16 dot is wrong
        query_tile = query_tile.to(tl.float32)

    last_lane = last_position // BLOCK_SIZE * BLOCK_PAD + last_position % BLOCK_SIZE
    num_steps = last_lane // TILE + 1
    if NUM_SPANS > 0:
        spans = (row * tl.num_programs(1) + kv_head) * NUM_SPANS + tile_rows % GROUP % NUM_SPANS
        span_ptr = spans_ptr + spans * 4  # [TILE_ROWS]
        sink_tokens = tl.load(span_ptr)
        floor_tokens = tl.load(span_ptr + 1)
        alpha_tokens = tl.load(span_ptr + 2)
        beta_64ths = tl.load(span_ptr + 3)
        elastic = alpha_tokens + beta_64ths * (positions + 1) // 64
        first_seen = positions + 1 - tl.maximum(floor_tokens, elastic)  # [TILE_ROWS], sinks apart
        # What a query sees first never falls, so the tile's first query bounds the gap: what
        # lies between the sinks and its span is hidden from every query of the tile.
        elastic = alpha_tokens + beta_64ths * (first_position + 1) // 64
        tile_first_seen = tl.min(first_position + 1 - tl.maximum(floor_tokens, elastic), axis=0)
        most_sinks = tl.max(sink_tokens, axis=0)
        window_begin = tl.maximum(tile_first_seen, 0)
        window_lane = window_begin // BLOCK_SIZE * BLOCK_PAD + window_begin % BLOCK_SIZE
        # No more sinks than the tile's queries see, or the product could overflow.
        seen_sinks = tl.minimum(most_sinks, last_position + 1)
        sinks_end = seen_sinks // BLOCK_SIZE * BLOCK_PAD + seen_sinks % BLOCK_SIZE
        num_sink_steps = tl.minimum((sinks_end + TILE - 1) // TILE, num_steps)
        gap = tl.maximum(window_lane // TILE - num_sink_steps, 0)
        num_steps -= gap

    running_max = tl.full([TILE_ROWS], float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros([TILE_ROWS], dtype=tl.float32)
    acc = tl.zeros([TILE_ROWS, HEAD_PAD], dtype=tl.float32)
    lanes = tl.arange(0, TILE)
    table_row_ptr = block_table_ptr + row * stride_table_row
    key_head_ptr = key_ptr + kv_head * STRIDE_KEY_HEAD
    value_head_ptr = value_ptr + kv_head * STRIDE_VALUE_HEAD
    for step in range(0, num_steps):
        tile = step
        if NUM_SPANS > 0:
            tile = tl.where(step < num_sink_steps, step, step + gap)
        blocks = (tile * TILE + lanes) // BLOCK_PAD  # [TILE]
        offsets = (tile * TILE + lanes) % BLOCK_PAD
        tokens = blocks * BLOCK_SIZE + offsets
        # Loaded is what at least one query of the tile sees: 0 * NaN would be NaN.
        token_mask = (offsets < BLOCK_SIZE) & (tokens <= last_position)
        visible = tokens[None, :] <= positions[:, None]  # [TILE_ROWS, TILE]
        if NUM_SPANS > 0:
            token_mask = token_mask & ((tokens < most_sinks) | (tokens >= tile_first_seen))
            is_sink = tokens[None, :] < sink_tokens[:, None]
            visible = visible & (is_sink | (tokens[None, :] >= first_seen[:, None]))
        visible = visible & token_mask[None, :]

        physical_blocks = tl.load(table_row_ptr + blocks, mask=token_mask, other=0).to(tl.int64)
        key_tile = tl.load(  # [HEAD_PAD, TILE]
            key_head_ptr
            + (physical_blocks * STRIDE_KEY_BLOCK + offsets * STRIDE_KEY_TOKEN)[None, :]
            + dims[:, None] * STRIDE_KEY_DIM,
            mask=dim_mask[:, None] & token_mask[None, :],
            other=0.0,
        )
        value_tile = tl.load(  # [TILE, HEAD_PAD]
            value_head_ptr
            + (physical_blocks * STRIDE_VALUE_BLOCK + offsets * STRIDE_VALUE_TOKEN)[:, None]
            + dims[None, :] * STRIDE_VALUE_DIM,
            mask=token_mask[:, None] & dim_mask[None, :],
            other=0.0,
        )
        if UPCAST:
            key_tile = key_tile.to(tl.float32)
            value_tile = value_tile.to(tl.float32)

        logits = tl.dot(query_tile, key_tile, input_precision="ieee") * scale
        logits = tl.where(visible, logits, float("-inf"))  # [TILE_ROWS, TILE]
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
        + (query_tokens * stride_out_token + query_heads * HEAD_SIZE)[:, None]
        + dims[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & dim_mask[None, :],
    )
