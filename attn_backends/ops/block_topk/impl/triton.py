"""Triton implementation of ``block_topk``.

One program per (row, KV head). Forced blocks are two ranges, known from lengths alone. Of the
others, the mass of the last one that still fits into the budget is found bit by bit: floats that
are not negative order like their bits, so counting passes, two bits each, replace a sort. Rows of
up to ``MAX_TILE`` blocks stay in registers; of longer ones every pass reads them again. One more
pass writes the selected blocks in ascending order, at the place that a prefix sum gives; comparing
bits and counting is exact, so this agrees with the reference for every input.

The grid depends on shapes alone; lengths and budgets stay on the device.

Proven in Triton's interpreter and compiled for sm_80 and sm_90 without a device; this version has
not run on a GPU (its predecessor has: docs/results.md).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from attn_backends.batch import BlockSelection
from attn_backends.ops import triton_support as support
from attn_backends.ops.dispatch import OpContext
from attn_backends.ops.triton_support import Launch

if TYPE_CHECKING:
    import triton.language as tl

MAX_TILE = 8192  # blocks held in registers at a time: 128K tokens in blocks of 16
BLOCKS_PER_WARP = 512  # 16 of each thread


def run(
    block_mass: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    budget_blocks: torch.Tensor,
    sink_blocks: int,
    recent_blocks: int,
    out: BlockSelection,
) -> None:
    """See ``api.py``."""
    if seq_lens.shape[0] == 0:
        return
    support.start(
        _kernels(),
        launches(block_mass, seq_lens, block_size, budget_blocks, sink_blocks, recent_blocks, out),
    )


def launches(
    block_mass: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    budget_blocks: torch.Tensor,
    sink_blocks: int,
    recent_blocks: int,
    out: BlockSelection,
) -> list[Launch]:
    """What ``run`` launches; see ``api.py``."""
    width = block_mass.shape[2]
    tile = min(MAX_TILE, max(16, support.power_of_two(width)))
    launch = Launch(
        "_topk_kernel",
        (seq_lens.shape[0], block_mass.shape[1]),
        (
            block_mass,
            seq_lens,
            budget_blocks,
            out.logical_blocks,
            out.counts,
            block_size,
            sink_blocks,
            recent_blocks,
            width,
            out.logical_blocks.shape[2],
            *out.logical_blocks.stride()[:2],
        ),
        {"TILE": tile, "IS_RESIDENT": width <= tile},
        num_warps=min(16, max(4, tile // BLOCKS_PER_WARP)),
    )
    return [launch]


def unsupported_reason(context: OpContext) -> str | None:
    """Any size, wherever Triton runs."""
    return support.unsupported_reason(context, _kernels, computes=False)


@functools.cache
def _kernels() -> dict[str, Any]:
    """The compiled kernel; the first call imports Triton, so that importing us does not.

    Triton looks names up in the globals of the kernels, hence ``global``. Settings and widths are
    no reason to compile anew.
    """
    global tl
    import triton
    import triton.language as tl

    numbers = [
        "block_size",
        "sink_blocks",
        "recent_blocks",
        "mass_width",
        "out_width",
        "stride_blocks_row",
        "stride_blocks_head",
    ]
    return {"_topk_kernel": triton.jit(_topk_kernel, do_not_specialize=numbers)}


def _topk_kernel(
    mass_ptr,
    seq_lens_ptr,
    budget_ptr,
    blocks_ptr,
    counts_ptr,
    block_size,
    sink_blocks,
    recent_blocks,
    mass_width,
    out_width,
    stride_blocks_row,
    stride_blocks_head,
    TILE: tl.constexpr,
    IS_RESIDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows times blocks may overflow int32
    kv_head = tl.program_id(1)
    num_blocks = (tl.load(seq_lens_ptr + row) + block_size - 1) // block_size
    count = tl.minimum(num_blocks, tl.maximum(tl.load(budget_ptr + row), 1))
    # The last block is forced even without recent blocks. From `others_end` on all blocks are
    # recent ones, before `others_begin` all are sinks; a small budget takes less of either.
    num_recent = tl.minimum(num_blocks, tl.maximum(recent_blocks, 1))
    others_end = num_blocks - num_recent
    others_begin = tl.minimum(sink_blocks, others_end)
    taken_recent = tl.minimum(count, num_recent)
    taken_sinks = tl.minimum(count - taken_recent, others_begin)
    wanted = count - taken_recent - taken_sinks  # of the blocks in between

    row_head = row * tl.num_programs(1) + kv_head
    mass_row_ptr = mass_ptr + row_head * mass_width
    lanes = tl.arange(0, TILE)
    if IS_RESIDENT:
        inside = (lanes >= others_begin) & (lanes < others_end)
        mass = tl.load(mass_row_ptr + lanes, mask=inside, other=0.0)
        resident = mass.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # -0.0 equals 0.0
        resident = tl.where(inside, resident, -1)  # below every threshold

    # The largest key that `wanted` blocks reach. Nothing to search for if none of them is
    # wanted (only NaN is beyond this limit) or all are (no key is below 0).
    threshold = tl.where(wanted > 0, 0, 0x7FFFFFFF)
    search = (wanted > 0) & (wanted < others_end - others_begin)
    # Two bits at a time from the top of 31. The last pass has the lowest bit alone; its second
    # candidate has failed in the pass before and fails again.
    shift = 29
    for _ in range(0, tl.where(search, 16, 0)):
        # How many keys reach each of three candidates, 21 bits a count.
        first = threshold + (1 << shift)
        second = threshold + (2 << shift)
        third = threshold + (3 << shift)
        if IS_RESIDENT:
            reaching = (
                (resident >= first).to(tl.int64)
                + ((resident >= second).to(tl.int64) << 21)
                + ((resident >= third).to(tl.int64) << 42)
            )
        else:
            reaching = tl.zeros([TILE], dtype=tl.int64)
            for start in range(others_begin, others_end, TILE):
                blocks = start + lanes
                inside = blocks < others_end
                mass = tl.load(mass_row_ptr + blocks, mask=inside, other=0.0)
                key = tl.where(inside, mass.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
                reaching += (
                    (key >= first).to(tl.int64)
                    + ((key >= second).to(tl.int64) << 21)
                    + ((key >= third).to(tl.int64) << 42)
                )
        total = tl.sum(reaching, axis=0)
        reach_first = (total & 0x1FFFFF) >= wanted
        reach_second = ((total >> 21) & 0x1FFFFF) >= wanted
        reach_third = (total >> 42) >= wanted
        digit = reach_first.to(tl.int32) + reach_second.to(tl.int32) + reach_third.to(tl.int32)
        threshold += digit << shift
        shift = tl.maximum(shift - 2, 0)

    # Of equal masses the later blocks win: so many from the start lose. Again two counts in one.
    if IS_RESIDENT:
        counted = (resident > threshold).to(tl.int64) + ((resident == threshold).to(tl.int64) << 32)
    else:
        counted = tl.zeros([TILE], dtype=tl.int64)
        for start in range(others_begin, others_end, TILE):
            blocks = start + lanes
            inside = blocks < others_end
            mass = tl.load(mass_row_ptr + blocks, mask=inside, other=0.0)
            key = tl.where(inside, mass.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
            counted += (key > threshold).to(tl.int64) + ((key == threshold).to(tl.int64) << 32)
    total = tl.sum(counted, axis=0)
    above = (total & 0xFFFFFFFF).to(tl.int32)
    tied_losers = (total >> 32).to(tl.int32) - (wanted - above)

    blocks_row_ptr = blocks_ptr + row * stride_blocks_row + kv_head * stride_blocks_head
    written = 0
    ties_seen = 0
    for start in range(0, num_blocks, TILE):
        blocks = start + lanes
        if IS_RESIDENT:
            key = resident
        else:
            between = (blocks >= others_begin) & (blocks < others_end)
            mass = tl.load(mass_row_ptr + blocks, mask=between, other=0.0)
            key = tl.where(between, mass.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
        is_tie = key == threshold
        is_sure = (key > threshold) | (blocks < taken_sinks)
        is_sure = is_sure | ((blocks >= num_blocks - taken_recent) & (blocks < num_blocks))
        # One prefix sum of both: TILE fits into 16 bits.
        ranks = tl.cumsum(is_sure.to(tl.int32) + (is_tie.to(tl.int32) << 16), axis=0)
        tie_rank = ties_seen + (ranks >> 16)  # from 1
        won_ties = tl.maximum(tie_rank - tied_losers, 0)
        won_before = tl.maximum(ties_seen - tied_losers, 0)
        places = written + (ranks & 0xFFFF) + won_ties - won_before - 1
        chosen = is_sure | (is_tie & (tie_rank > tied_losers))
        tl.store(blocks_row_ptr + places, blocks, mask=chosen & (places < out_width))
        if not IS_RESIDENT:
            in_tile = tl.sum(is_sure.to(tl.int32) + (is_tie.to(tl.int32) << 16), axis=0)
            ties_seen += in_tile >> 16
            written += (in_tile & 0xFFFF) + tl.maximum(ties_seen - tied_losers, 0) - won_before
    for start in range(0, out_width, TILE):
        places = start + lanes
        padding = tl.full([TILE], -1, dtype=tl.int32)
        tl.store(blocks_row_ptr + places, padding, mask=(places >= count) & (places < out_width))
    tl.store(counts_ptr + row_head, count)
