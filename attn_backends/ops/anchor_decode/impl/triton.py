"""Triton implementation of ``anchor_decode``.

Split-KV decoding as in ``sparse_decode``, over every block of the row, in tiles of tokens gathered
through a vector of block ids. Beside the split's maximum, sum and unnormalised output the first
kernel leaves the log-sum-exp of each *unit* per query head in an fp32 workspace. A unit is a block,
or a tile's worth of it where blocks are larger than tiles. The second launch does what needs the
whole row: it merges the splits' outputs in a fixed order and turns units into the blocks' shares.
Without ``block_mass`` nothing is computed or stored for it; without ``out`` no value is read. A row
of one split has its output from the first launch.

How a row is split and merged depends on its own length alone, so a request's bits do not depend on
its neighbours. The grids depend on shapes alone; lengths stay on the device, where programs without
work leave early. Tokens past the row's end are masked at the load, so what their memory holds
cannot matter.

A tile is laid over blocks padded to a power of two: lane ``x`` is token ``x % BLOCK_PAD`` of the
row's block ``x // BLOCK_PAD``.

Proven in Triton's interpreter and compiled for sm_80 and sm_90 without a device; this version has
not run on a GPU (its predecessor has: docs/results.md).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from attn_backends.batch import PagedBatch
from attn_backends.ops import triton_support as support
from attn_backends.ops.dispatch import OpContext
from attn_backends.ops.triton_support import Launch, Tile

if TYPE_CHECKING:
    import triton.language as tl

MAX_SPLITS = 128  # bounds the workspace and fixes the shape of the merge
MERGED_AT_ONCE = 16  # splits
MASS_TILE = 128  # blocks that a program of the last launch gives their mass


def run(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    out: torch.Tensor | None,
    block_mass: torch.Tensor | None,
) -> None:
    """See ``api.py``."""
    if batch.num_reqs == 0:
        return
    shared_bytes = support.shared_bytes_of(query)
    caches = (key_cache, value_cache)
    with nullcontext() if out is None else support.rounded(out) as target:
        support.start(
            _kernels(), launches(query, *caches, batch, scale, target, block_mass, shared_bytes)
        )


def launches(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    out: torch.Tensor | None,
    block_mass: torch.Tensor | None,
    shared_bytes: int,
) -> Iterator[Launch]:
    """What ``run`` launches on a card with that much shared memory; see ``api.py``."""
    support.check_heads_are_contiguous(query, out)
    block_size, head_size = key_cache.shape[2:]
    tile = support.tile_of(head_size, key_cache.dtype, 1 if out is None else 2, shared_bytes)
    num_tiles = -(-batch.block_table.shape[1] * support.power_of_two(block_size) // tile.tokens)
    num_splits = min(MAX_SPLITS, num_tiles)
    head_numbers = num_splits * (2 if out is None else 2 + head_size)
    if block_mass is not None:
        head_numbers += num_tiles * max(1, tile.tokens // block_size)
    at_once = support.rows_at_once(batch.num_reqs, 4 * query.shape[1] * head_numbers)
    caches = (key_cache, value_cache)
    if at_once == batch.num_reqs:
        yield from _launches_of_rows(query, caches, batch, scale, out, block_mass, tile, num_splits)
        return
    for first in range(0, batch.num_reqs, at_once):
        last = min(first + at_once, batch.num_reqs)
        yield from launches(
            query[first:last],
            *caches,
            batch.rows(first, last, 0, last - first),
            scale,
            None if out is None else out[first:last],
            None if block_mass is None else block_mass[first:last],
            shared_bytes,
        )


def _launches_of_rows(
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    batch: PagedBatch,
    scale: float,
    out: torch.Tensor | None,
    block_mass: torch.Tensor | None,
    tile: Tile,
    num_splits: int,
) -> Iterator[Launch]:
    """Rows whose workspace stays within its limit."""
    _, num_kv_heads, block_size, head_size = caches[0].shape
    num_reqs, num_query_heads = batch.num_reqs, query.shape[1]
    group = num_query_heads // num_kv_heads
    has_out, has_mass = out is not None, block_mass is not None
    block_pad = support.power_of_two(block_size)
    unit = min(block_pad, tile.tokens)
    max_blocks = batch.block_table.shape[1]
    num_partials = num_reqs * num_query_heads * num_splits
    # Two numbers and the output of each split, then each unit's log-sum-exp per query head. A
    # unit's heads are side by side: they are stored at once.
    num_outs = num_partials * head_size if has_out and num_splits > 1 else 0
    num_lses = num_reqs * num_query_heads * max_blocks * (block_pad // unit) if has_mass else 0
    outs_begin = -(-2 * num_partials // 4) * 4  # in whole vectors of 16 bytes
    lses_begin = outs_begin + num_outs
    workspace = query.new_empty(lses_begin + num_lses, dtype=torch.float32)
    stats, outs, lses = workspace, workspace[outs_begin:], workspace[lses_begin:]
    sizes = {
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "BLOCK_PAD": block_pad,
        "HEAD_SIZE": head_size,
        "HEAD_PAD": support.padded_head(head_size),
        "TILE": tile.tokens,
        "UNIT": unit,
        "MAX_SPLITS": MAX_SPLITS,
        "HAS_OUT": has_out,
        "HAS_MASS": has_mass,
    }
    target = workspace if out is None else out  # not written without one
    per_head = support.programs_per_head(num_splits, num_reqs * num_kv_heads)
    yield Launch(
        "_split_kernel",
        (num_reqs, num_kv_heads, per_head),
        (
            query,
            *caches,
            target,
            stats,
            outs,
            lses,
            batch.seq_lens,
            batch.block_table,
            scale,
            query.stride(0),
            target.stride(0),
            batch.block_table.stride(0),
            max_blocks,
            num_splits,
        ),
        {
            **sizes,
            "GROUP_PAD": max(16, support.power_of_two(group)),  # tl.dot needs 16 rows
            **support.cache_strides(*caches),
            "UPCAST": support.interpreted(),
        },
        num_stages=tile.num_stages,
    )
    merges_outs = has_out and num_splits > 1
    mass_width = 0 if block_mass is None else block_mass.shape[2]
    per_head = max(group if merges_outs else 0, -(-mass_width // MASS_TILE))
    if per_head == 0:
        return
    yield Launch(
        "_finish_kernel",
        (num_reqs, num_kv_heads, per_head),
        (
            stats,
            outs,
            lses,
            target,
            workspace if block_mass is None else block_mass,  # not written without one
            batch.seq_lens,
            target.stride(0),
            mass_width,
            max_blocks,
            num_splits,
        ),
        {
            **sizes,
            "GROUP_PAD": support.power_of_two(group),
            "AT_ONCE": MERGED_AT_ONCE,
            "MASS_TILE": MASS_TILE,
        },
    )


def unsupported_reason(context: OpContext) -> str | None:
    """Head sizes and dtypes that were tested, wherever Triton runs."""
    return support.unsupported_reason(context, _kernels)


@functools.cache
def _kernels() -> dict[str, Any]:
    """The compiled kernels; the first call imports Triton, so that importing us does not.

    Triton looks names up in the globals of the kernels, hence ``global``. It must not compile
    anew for a table or masses of another width: bits would depend on the batch.
    """
    global tl
    import triton
    import triton.language as tl

    return {
        "_split_kernel": triton.jit(
            _split_kernel, do_not_specialize=["stride_table_row", "max_blocks", "num_splits"]
        ),
        "_finish_kernel": triton.jit(
            _finish_kernel, do_not_specialize=["mass_width", "max_blocks", "num_splits"]
        ),
    }


def _split_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    stats_ptr,
    outs_ptr,
    lses_ptr,
    seq_lens_ptr,
    block_table_ptr,
    scale,
    stride_query_row,
    stride_out_row,
    stride_table_row,
    max_blocks,
    num_splits,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_MASS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    STRIDE_KEY_BLOCK: tl.constexpr,
    STRIDE_KEY_HEAD: tl.constexpr,
    STRIDE_KEY_TOKEN: tl.constexpr,
    STRIDE_KEY_DIM: tl.constexpr,
    STRIDE_VALUE_BLOCK: tl.constexpr,
    STRIDE_VALUE_HEAD: tl.constexpr,
    STRIDE_VALUE_TOKEN: tl.constexpr,
    STRIDE_VALUE_DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    TILE_UNITS: tl.constexpr = TILE // UNIT
    # Rows times blocks, heads or splits overflow int32 in large caches.
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + row)
    count = (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    num_tiles = (count * BLOCK_PAD + TILE - 1) // TILE
    split_tiles = tl.maximum((num_tiles + MAX_SPLITS - 1) // MAX_SPLITS, 1)
    # A row without tokens, as in padded batches, has one empty split: it gives zeros.
    row_splits = tl.maximum((num_tiles + split_tiles - 1) // split_tiles, 1)
    if tl.program_id(2) >= row_splits:
        return

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

    lanes = tl.arange(0, TILE)
    table_row_ptr = block_table_ptr + row * stride_table_row
    key_head_ptr = key_ptr + kv_head * STRIDE_KEY_HEAD
    value_head_ptr = value_ptr + kv_head * STRIDE_VALUE_HEAD
    # [num_reqs, num_kv_heads, max_blocks * (BLOCK_PAD // UNIT), GROUP]
    units_of_head = max_blocks.to(tl.int64) * (BLOCK_PAD // UNIT) * GROUP
    lses_head_ptr = lses_ptr + (row * tl.num_programs(1) + kv_head) * units_of_head
    for split in range(tl.program_id(2), row_splits, tl.num_programs(2)):
        running_max = tl.full([GROUP_PAD], float("-inf"), dtype=tl.float32)
        running_sum = tl.zeros([GROUP_PAD], dtype=tl.float32)
        acc = tl.zeros([GROUP_PAD, HEAD_PAD], dtype=tl.float32)
        first = split * split_tiles
        for tile in range(first, tl.minimum(first + split_tiles, num_tiles)):
            blocks = (tile * TILE + lanes) // BLOCK_PAD  # [TILE]
            offsets = (tile * TILE + lanes) % BLOCK_PAD
            # Masked at the load and not only in the logits: 0 * NaN would be NaN.
            token_mask = (offsets < BLOCK_SIZE) & (blocks * BLOCK_SIZE + offsets < seq_len)
            physical_blocks = tl.load(table_row_ptr + blocks, mask=token_mask, other=0).to(tl.int64)
            key_tile = tl.load(  # [HEAD_PAD, TILE]
                key_head_ptr
                + (physical_blocks * STRIDE_KEY_BLOCK + offsets * STRIDE_KEY_TOKEN)[None, :]
                + dims[:, None] * STRIDE_KEY_DIM,
                mask=dim_mask[:, None] & token_mask[None, :],
                other=0.0,
            )
            if UPCAST:
                key_tile = key_tile.to(tl.float32)
            if HAS_OUT:
                value_tile = tl.load(  # [TILE, HEAD_PAD]
                    value_head_ptr
                    + (physical_blocks * STRIDE_VALUE_BLOCK + offsets * STRIDE_VALUE_TOKEN)[:, None]
                    + dims[None, :] * STRIDE_VALUE_DIM,
                    mask=token_mask[:, None] & dim_mask[None, :],
                    other=0.0,
                )
                if UPCAST:
                    value_tile = value_tile.to(tl.float32)

            logits = tl.dot(query_tile, key_tile, input_precision="ieee") * scale
            logits = tl.where(token_mask[None, :], logits, float("-inf"))  # [GROUP_PAD, TILE]
            new_max = tl.maximum(running_max, tl.max(logits, axis=1))
            # A tile past the end of the row's last block, or in the padding of any, has no token:
            # until one does this is -inf, and -inf - -inf is NaN.
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            weights = tl.exp(logits - safe_max[:, None])
            # [GROUP_PAD, TILE_UNITS]; with and without masses in the same order
            unit_sums = tl.sum(tl.reshape(weights, [GROUP_PAD, TILE_UNITS, UNIT]), axis=2)
            if HAS_MASS:
                has_share = unit_sums > 0.0  # else it is below the smallest fp32
                lse = safe_max[:, None] + tl.log(tl.where(has_share, unit_sums, 1.0))
                units = tile * TILE_UNITS + tl.arange(0, TILE_UNITS)
                unit_mask = units * UNIT < count * BLOCK_PAD
                tl.store(
                    lses_head_ptr + units[None, :] * GROUP + group_rows[:, None],
                    tl.where(has_share, lse, float("-inf")),
                    mask=group_mask[:, None] & unit_mask[None, :],
                )
            rescale = tl.exp(running_max - safe_max)
            running_sum = running_sum * rescale + tl.sum(unit_sums, axis=1)
            if HAS_OUT:
                acc = acc * rescale[:, None]
                acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc, input_precision="ieee")
            running_max = new_max

        # [GROUP_PAD], index into [num_reqs, num_query_heads, num_splits]
        partials = (row * tl.num_programs(1) * GROUP + query_heads) * num_splits + split
        tl.store(stats_ptr + partials * 2, running_max, mask=group_mask)
        tl.store(stats_ptr + partials * 2 + 1, running_sum, mask=group_mask)
        if HAS_OUT:
            if row_splits == 1:
                result = acc / tl.where(running_sum == 0.0, 1.0, running_sum)[:, None]
                out_row_ptr = out_ptr + row * stride_out_row
                tl.store(
                    out_row_ptr + query_heads[:, None] * HEAD_SIZE + dims[None, :],
                    result.to(out_ptr.dtype.element_ty),
                    mask=head_mask,
                )
            else:
                tl.store(
                    outs_ptr + partials[:, None] * HEAD_SIZE + dims[None, :], acc, mask=head_mask
                )


def _finish_kernel(
    stats_ptr,
    outs_ptr,
    lses_ptr,
    out_ptr,
    block_mass_ptr,
    seq_lens_ptr,
    stride_out_row,
    mass_width,
    max_blocks,
    num_splits,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_MASS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
    MASS_TILE: tl.constexpr,
):
    BLOCK_UNITS: tl.constexpr = BLOCK_PAD // UNIT
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)  # the query head of the group that is merged, the blocks' tile
    count = (tl.load(seq_lens_ptr + row) + BLOCK_SIZE - 1) // BLOCK_SIZE
    num_tiles = (count * BLOCK_PAD + TILE - 1) // TILE
    split_tiles = tl.maximum((num_tiles + MAX_SPLITS - 1) // MAX_SPLITS, 1)
    row_splits = tl.maximum((num_tiles + split_tiles - 1) // split_tiles, 1)
    # Always MAX_SPLITS wide: the order of summation must not follow the batch's width.
    splits = tl.arange(0, MAX_SPLITS)
    split_mask = splits < row_splits
    first_head = (row * tl.num_programs(1) + kv_head) * GROUP

    if HAS_OUT:  # noqa: SIM102, decided at compile time
        if (part < GROUP) & (row_splits > 1):
            first = (first_head + part) * num_splits
            head_stats_ptr = stats_ptr + (first + splits) * 2
            maxima = tl.load(head_stats_ptr, mask=split_mask, other=float("-inf"))
            sums = tl.load(head_stats_ptr + 1, mask=split_mask, other=0.0)
            row_max = tl.max(maxima, axis=0)
            total = tl.sum(sums * tl.exp(maxima - row_max), axis=0)
            dims = tl.arange(0, HEAD_PAD)
            dim_mask = dims < HEAD_SIZE
            acc = tl.zeros([HEAD_PAD], dtype=tl.float32)
            for start in range(0, row_splits, AT_ONCE):
                some = start + tl.arange(0, AT_ONCE)
                some_mask = some < row_splits
                some_max = tl.load(
                    stats_ptr + (first + some) * 2, mask=some_mask, other=float("-inf")
                )
                outs = tl.load(  # [AT_ONCE, HEAD_PAD]
                    outs_ptr + (first + some)[:, None] * HEAD_SIZE + dims[None, :],
                    mask=some_mask[:, None] & dim_mask[None, :],
                    other=0.0,
                )
                acc += tl.sum(outs * tl.exp(some_max - row_max)[:, None], axis=0)
            query_head = kv_head * GROUP + part
            tl.store(
                out_ptr + row * stride_out_row + query_head * HEAD_SIZE + dims,
                (acc / total).to(out_ptr.dtype.element_ty),
                mask=dim_mask,
            )

    if HAS_MASS:  # noqa: SIM102, decided at compile time
        if part * MASS_TILE < mass_width:
            group_rows = tl.arange(0, GROUP_PAD)
            group_mask = group_rows < GROUP
            blocks = part * MASS_TILE + tl.arange(0, MASS_TILE)
            block_mask = blocks < count
            mass = tl.zeros([MASS_TILE], dtype=tl.float32)
            if part * MASS_TILE < count:
                group_stats_ptr = (
                    stats_ptr
                    + (  # [GROUP_PAD, MAX_SPLITS]
                        ((first_head + group_rows) * num_splits)[:, None] + splits[None, :]
                    )
                    * 2
                )
                stats_mask = group_mask[:, None] & split_mask[None, :]
                group_maxima = tl.load(group_stats_ptr, mask=stats_mask, other=float("-inf"))
                group_sums = tl.load(group_stats_ptr + 1, mask=stats_mask, other=0.0)
                group_max = tl.max(group_maxima, axis=1)
                group_max = tl.where(group_mask, group_max, 0.0)
                totals = tl.sum(group_sums * tl.exp(group_maxima - group_max[:, None]), axis=1)
                row_lse = group_max + tl.log(tl.where(group_mask, totals, 1.0))  # [GROUP_PAD]
                head_index = row * tl.num_programs(1) + kv_head
                lses_head_ptr = lses_ptr + head_index * (
                    max_blocks.to(tl.int64) * BLOCK_UNITS * GROUP
                )
                for unit in tl.static_range(BLOCK_UNITS):
                    lse = tl.load(  # [MASS_TILE, GROUP_PAD]
                        lses_head_ptr
                        + (blocks[:, None] * BLOCK_UNITS + unit) * GROUP
                        + group_rows[None, :],
                        mask=block_mask[:, None] & group_mask[None, :],
                        other=float("-inf"),  # no share
                    )
                    mass += tl.sum(tl.exp(lse - row_lse[None, :]), axis=1)
            mass_ptr = block_mass_ptr + (row * tl.num_programs(1) + kv_head) * mass_width
            tl.store(mass_ptr + blocks, mass, mask=blocks < mass_width)
