"""Triton implementation of ``sparse_decode``.

Split-KV decoding. One program serves splits of one (row, KV head): it walks tiles of tokens that
it gathers through a vector of block ids, selection -> logical -> physical, so the size of a KV
block does not matter. All query heads of the KV head share the loaded tiles. A row of one split is
finished there; of others, maximum, sum and unnormalised output of each split go to an fp32
workspace, and a second launch merges the splits of a (row, query head) in a fixed order.

How a row is split and merged depends on its own number of selected blocks alone, so a request's
bits do not depend on its neighbours. The grids depend on shapes alone; counts and lengths stay on
the device, where programs without work leave early. Hidden tokens are masked at the load, so what
their memory holds cannot matter.

A tile is laid over blocks padded to a power of two: lane ``x`` is token ``x % BLOCK_PAD`` of the
selection's entry ``x // BLOCK_PAD``.

Proven in Triton's interpreter and compiled for sm_80 and sm_90 without a device; this version has
not run on a GPU (its predecessor has: docs/results.md).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from attn_backends.batch import BlockSelection, PagedBatch, SpanRule
from attn_backends.ops import triton_support as support
from attn_backends.ops.dispatch import OpContext
from attn_backends.ops.triton_support import Launch, Tile

if TYPE_CHECKING:
    import triton.language as tl

MAX_SPLITS = 64  # bounds the workspace and fixes the shape of the merge
MERGED_AT_ONCE = 16  # splits


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
    shared_bytes = support.shared_bytes_of(query)
    caches = (key_cache, value_cache)
    with support.rounded(out) as target:
        support.start(
            _kernels(),
            launches(query, *caches, batch, selection, rule, scale, target, shared_bytes),
        )


def launches(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    selection: BlockSelection,
    rule: SpanRule | None,
    scale: float,
    out: torch.Tensor,
    shared_bytes: int,
) -> Iterator[Launch]:
    """What ``run`` launches on a card with that much shared memory; see ``api.py``."""
    support.check_heads_are_contiguous(query, out)
    block_size, head_size = key_cache.shape[2:]
    tile = support.tile_of(head_size, key_cache.dtype, 2, shared_bytes)
    width = selection.logical_blocks.shape[2]
    num_tiles = -(-width * support.power_of_two(block_size) // tile.tokens)
    num_splits = min(MAX_SPLITS, num_tiles)
    # Output and two numbers of each split; nothing where every row has one.
    row_bytes = 4 * query.shape[1] * num_splits * (head_size + 2) if num_splits > 1 else 0
    at_once = support.rows_at_once(batch.num_reqs, row_bytes)
    caches = (key_cache, value_cache)
    if at_once == batch.num_reqs:
        yield from _launches_of_rows(
            query, caches, batch, selection, rule, scale, out, tile, num_splits
        )
        return
    for first in range(0, batch.num_reqs, at_once):
        last = min(first + at_once, batch.num_reqs)
        yield from launches(
            query[first:last],
            *caches,
            batch.rows(first, last, 0, last - first),
            selection.rows(first, last),
            None if rule is None else rule.rows(first, last),
            scale,
            out[first:last],
            shared_bytes,
        )


def _launches_of_rows(
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    selection: BlockSelection,
    rule: SpanRule | None,
    scale: float,
    out: torch.Tensor,
    tile: Tile,
    num_splits: int,
) -> Iterator[Launch]:
    """Rows whose workspace stays within its limit."""
    _, num_kv_heads, block_size, head_size = caches[0].shape
    num_query_heads = query.shape[1]
    group = num_query_heads // num_kv_heads
    blocks, counts, heads = selection.logical_blocks, selection.counts, selection.heads
    num_partials = batch.num_reqs * num_query_heads * num_splits if num_splits > 1 else 1
    partials = query.new_empty(num_partials * (head_size + 2), dtype=torch.float32)
    sizes = {
        "GROUP": group,
        "BLOCK_PAD": support.power_of_two(block_size),
        "HEAD_SIZE": head_size,
        "HEAD_PAD": support.padded_head(head_size),
        "TILE": tile.tokens,
        "MAX_SPLITS": MAX_SPLITS,
        "STRIDE_COUNT_ROW": counts.stride(0),
        "HAS_HEADS": heads is not None,
    }
    heads = counts if heads is None else heads  # not read without a map
    per_head = support.programs_per_head(num_splits, batch.num_reqs * num_kv_heads)
    yield Launch(
        "_split_kernel",
        (batch.num_reqs, num_kv_heads, per_head),
        (
            query,
            *caches,
            out,
            partials,
            batch.seq_lens,
            batch.block_table,
            blocks,
            counts,
            heads,
            counts if rule is None else rule.values,  # not read without a rule
            scale,
            query.stride(0),
            out.stride(0),
            batch.block_table.stride(0),
            *blocks.stride()[:2],
            num_splits,
        ),
        {
            **sizes,
            "GROUP_PAD": max(16, support.power_of_two(group)),  # tl.dot needs 16 rows
            "BLOCK_SIZE": block_size,
            **support.cache_strides(*caches),
            "NUM_SPANS": 0 if rule is None else rule.values.shape[2],
            "UPCAST": support.interpreted(),
        },
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        yield Launch(
            "_merge_kernel",
            (batch.num_reqs, num_query_heads),
            (partials, out, counts, heads, out.stride(0), num_splits),
            {**sizes, "AT_ONCE": MERGED_AT_ONCE},
        )


def unsupported_reason(context: OpContext) -> str | None:
    """Head sizes and dtypes that were tested, wherever Triton runs."""
    return support.unsupported_reason(context, _kernels)


@functools.cache
def _kernels() -> dict[str, Any]:
    """The compiled kernels; the first call imports Triton, so that importing us does not.

    Triton looks names up in the globals of the kernels, hence ``global``. It must not compile
    anew for a table or selection of another width: bits would depend on the batch.
    """
    global tl
    import triton
    import triton.language as tl

    widths = ["stride_table_row", "stride_logical_row", "stride_logical_head", "num_splits"]
    return {
        "_split_kernel": triton.jit(_split_kernel, do_not_specialize=widths),
        "_merge_kernel": triton.jit(_merge_kernel, do_not_specialize=["num_splits"]),
    }


def _split_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    partials_ptr,
    seq_lens_ptr,
    block_table_ptr,
    logical_blocks_ptr,
    counts_ptr,
    heads_ptr,
    spans_ptr,
    scale,
    stride_query_row,
    stride_out_row,
    stride_table_row,
    stride_logical_row,
    stride_logical_head,
    num_splits,
    GROUP: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    STRIDE_COUNT_ROW: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE_KEY_BLOCK: tl.constexpr,
    STRIDE_KEY_HEAD: tl.constexpr,
    STRIDE_KEY_TOKEN: tl.constexpr,
    STRIDE_KEY_DIM: tl.constexpr,
    STRIDE_VALUE_BLOCK: tl.constexpr,
    STRIDE_VALUE_HEAD: tl.constexpr,
    STRIDE_VALUE_TOKEN: tl.constexpr,
    STRIDE_VALUE_DIM: tl.constexpr,
    NUM_SPANS: tl.constexpr,  # of a KV head; 0: no rule
    UPCAST: tl.constexpr,
):
    # Rows times blocks, heads or splits overflow int32 in large caches.
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    selection_head = kv_head
    if HAS_HEADS:
        selection_head = tl.load(heads_ptr + kv_head).to(tl.int64)
    count = tl.load(counts_ptr + row * STRIDE_COUNT_ROW + selection_head)
    num_tiles = (count * BLOCK_PAD + TILE - 1) // TILE
    split_tiles = tl.maximum((num_tiles + MAX_SPLITS - 1) // MAX_SPLITS, 1)
    # A row without blocks, as in padded batches, has one empty split: it gives zeros.
    row_splits = tl.maximum((num_tiles + split_tiles - 1) // split_tiles, 1)
    if tl.program_id(2) >= row_splits:
        return
    seq_len = tl.load(seq_lens_ptr + row)

    group_rows = tl.arange(0, GROUP_PAD)
    group_mask = group_rows < GROUP
    query_heads = kv_head * GROUP + group_rows  # [GROUP_PAD]
    dims = tl.arange(0, HEAD_PAD)
    dim_mask = dims < HEAD_SIZE
    head_mask = group_mask[:, None] & dim_mask[None, :]
    query_tile = tl.load(  # [GROUP_PAD, HEAD_PAD]
        query_ptr + row * stride_query_row + query_heads[:, None] * HEAD_SIZE + dims[None, :],
        mask=head_mask,
        other=0.0,
    )
    if UPCAST:  # the interpreter's bf16 dot is wrong
        query_tile = query_tile.to(tl.float32)
    if NUM_SPANS > 0:
        spans = (row * tl.num_programs(1) + kv_head) * NUM_SPANS + group_rows % NUM_SPANS
        span_ptr = spans_ptr + spans * 4  # [GROUP_PAD]
        sink_tokens = tl.load(span_ptr)
        elastic = tl.load(span_ptr + 2) + tl.load(span_ptr + 3) * seq_len // 64
        first_seen = seq_len - tl.maximum(tl.load(span_ptr + 1), elastic)  # sinks apart
        most_sinks, least_seen = tl.max(sink_tokens, axis=0), tl.min(first_seen, axis=0)

    lanes = tl.arange(0, TILE)
    table_row_ptr = block_table_ptr + row * stride_table_row
    logical_row_ptr = (
        logical_blocks_ptr + row * stride_logical_row + selection_head * stride_logical_head
    )
    key_head_ptr = key_ptr + kv_head * STRIDE_KEY_HEAD
    value_head_ptr = value_ptr + kv_head * STRIDE_VALUE_HEAD
    for split in range(tl.program_id(2), row_splits, tl.num_programs(2)):
        running_max = tl.full([GROUP_PAD], float("-inf"), dtype=tl.float32)
        running_sum = tl.zeros([GROUP_PAD], dtype=tl.float32)
        acc = tl.zeros([GROUP_PAD, HEAD_PAD], dtype=tl.float32)
        first = split * split_tiles
        for tile in range(first, tl.minimum(first + split_tiles, num_tiles)):
            entries = (tile * TILE + lanes) // BLOCK_PAD  # [TILE]
            offsets = (tile * TILE + lanes) % BLOCK_PAD
            token_mask = entries < count
            logical_blocks = tl.load(logical_row_ptr + entries, mask=token_mask, other=0)
            physical_blocks = tl.load(table_row_ptr + logical_blocks, mask=token_mask, other=0).to(
                tl.int64
            )
            tokens = logical_blocks * BLOCK_SIZE + offsets
            # Masked at the load and not only in the logits: 0 * NaN would be NaN.
            token_mask = token_mask & (offsets < BLOCK_SIZE) & (tokens < seq_len)
            if NUM_SPANS > 0:  # what some query head of the group sees
                token_mask = token_mask & ((tokens < most_sinks) | (tokens >= least_seen))
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
            visible = token_mask[None, :]
            if NUM_SPANS > 1:
                is_sink = tokens[None, :] < sink_tokens[:, None]
                visible = visible & (is_sink | (tokens[None, :] >= first_seen[:, None]))
            logits = tl.where(visible, logits, float("-inf"))  # [GROUP_PAD, TILE]
            new_max = tl.maximum(running_max, tl.max(logits, axis=1))
            # While the rule has hidden everything so far this is -inf, and -inf - -inf is NaN.
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            weights = tl.exp(logits - safe_max[:, None])
            rescale = tl.exp(running_max - safe_max)
            running_sum = running_sum * rescale + tl.sum(weights, axis=1)
            acc = acc * rescale[:, None]
            acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc, input_precision="ieee")
            running_max = new_max

        if row_splits == 1:
            result = acc / tl.where(running_sum == 0.0, 1.0, running_sum)[:, None]
            tl.store(
                out_ptr + row * stride_out_row + query_heads[:, None] * HEAD_SIZE + dims[None, :],
                result.to(out_ptr.dtype.element_ty),
                mask=head_mask,
            )
        else:
            # Outputs [num_reqs, num_query_heads, num_splits, HEAD_SIZE], then maxima and sums.
            num_query_heads = tl.num_programs(1) * GROUP
            partials = (row * num_query_heads + query_heads) * num_splits + split  # [GROUP_PAD]
            stats_ptr = partials_ptr + tl.num_programs(0).to(tl.int64) * (
                num_query_heads * num_splits * HEAD_SIZE
            )
            tl.store(stats_ptr + partials * 2, running_max, mask=group_mask)
            tl.store(stats_ptr + partials * 2 + 1, running_sum, mask=group_mask)
            tl.store(
                partials_ptr + partials[:, None] * HEAD_SIZE + dims[None, :], acc, mask=head_mask
            )


def _merge_kernel(
    partials_ptr,
    out_ptr,
    counts_ptr,
    heads_ptr,
    stride_out_row,
    num_splits,
    GROUP: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    STRIDE_COUNT_ROW: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    query_head = tl.program_id(1)
    selection_head = (query_head // GROUP).to(tl.int64)
    if HAS_HEADS:
        selection_head = tl.load(heads_ptr + selection_head).to(tl.int64)
    count = tl.load(counts_ptr + row * STRIDE_COUNT_ROW + selection_head)
    num_tiles = (count * BLOCK_PAD + TILE - 1) // TILE
    split_tiles = tl.maximum((num_tiles + MAX_SPLITS - 1) // MAX_SPLITS, 1)
    row_splits = (num_tiles + split_tiles - 1) // split_tiles
    if row_splits <= 1:  # its only program has written the output
        return

    first = (row * tl.num_programs(1) + query_head) * num_splits
    stats_ptr = partials_ptr + tl.num_programs(0).to(tl.int64) * (
        tl.num_programs(1) * num_splits * HEAD_SIZE
    )
    # Always MAX_SPLITS wide: the order of summation must not follow the batch's width.
    splits = tl.arange(0, MAX_SPLITS)
    split_mask = splits < row_splits
    maxima = tl.load(stats_ptr + (first + splits) * 2, mask=split_mask, other=float("-inf"))
    sums = tl.load(stats_ptr + (first + splits) * 2 + 1, mask=split_mask, other=0.0)
    row_max = tl.max(maxima, axis=0)
    safe_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    total = tl.sum(sums * tl.exp(maxima - safe_max), axis=0)
    dims = tl.arange(0, HEAD_PAD)
    dim_mask = dims < HEAD_SIZE
    acc = tl.zeros([HEAD_PAD], dtype=tl.float32)
    for start in range(0, row_splits, AT_ONCE):
        some = start + tl.arange(0, AT_ONCE)
        some_mask = some < row_splits
        some_max = tl.load(stats_ptr + (first + some) * 2, mask=some_mask, other=float("-inf"))
        outs = tl.load(  # [AT_ONCE, HEAD_PAD]
            partials_ptr + (first + some)[:, None] * HEAD_SIZE + dims[None, :],
            mask=some_mask[:, None] & dim_mask[None, :],
            other=0.0,
        )
        acc += tl.sum(outs * tl.exp(some_max - safe_max)[:, None], axis=0)
    result = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out_ptr + row * stride_out_row + query_head * HEAD_SIZE + dims,
        result.to(out_ptr.dtype.element_ty),
        mask=dim_mask,
    )
