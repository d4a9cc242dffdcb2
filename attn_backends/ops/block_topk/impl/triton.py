"""Triton implementation of ``block_topk``.

One program per (row, KV head). Forced blocks are two ranges, known from lengths alone. Of
the others, the mass of the last one that still fits into the budget is found bit by bit:
floats that are not negative order like their bits, so 31 counting passes over the row
replace a sort. A last pass writes the selected blocks in ascending order, at the place that
a prefix sum gives; comparing bits and counting is exact, so this agrees with the reference
for every input.

The grid depends on shapes alone; lengths and budgets stay on the device.

Proven in Triton's interpreter; run on an H200 at commit fa7282f (docs/results.md).
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch

from attn_backends.batch import BlockSelection
from attn_backends.ops.dispatch import OpContext

if TYPE_CHECKING:
    import triton
    import triton.language as tl

MAX_TILE = 1024  # blocks held in registers at a time; longer rows are read in a loop


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
    num_reqs, num_kv_heads = seq_lens.shape[0], block_mass.shape[1]
    if num_reqs == 0:
        return
    kernel = _kernel()
    kernel[(num_reqs, num_kv_heads)](
        block_mass,
        seq_lens,
        budget_blocks,
        out.logical_blocks,
        out.counts,
        block_size,
        sink_blocks,
        recent_blocks,
        out.logical_blocks.shape[2],
        block_mass.stride(0),
        block_mass.stride(1),
        out.logical_blocks.stride(0),
        out.logical_blocks.stride(1),
        *out.counts.stride(),
        TILE=min(MAX_TILE, max(16, triton.next_power_of_2(block_mass.shape[2]))),
        num_warps=4,
    )


def unsupported_reason(context: OpContext) -> str | None:
    """Any size, wherever Triton runs."""
    if context.device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton does not run on CPU (TRITON_INTERPRET=1 runs its slow interpreter)"
    try:
        _kernel()
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


@functools.cache
def _kernel() -> Any:
    """The compiled kernel; the first call imports Triton, so that importing us does not.

    Triton looks names up in the globals of the kernels, hence ``global``.
    """
    global triton, tl
    import triton
    import triton.language as tl

    return triton.jit(_topk_kernel)


def _topk_kernel(
    mass_ptr,
    seq_lens_ptr,
    budget_ptr,
    blocks_ptr,
    counts_ptr,
    block_size,
    sink_blocks,
    recent_blocks,
    out_width,
    stride_mass_row,
    stride_mass_head,
    stride_blocks_row,
    stride_blocks_head,
    stride_count_row,
    stride_count_head,
    TILE: tl.constexpr,
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

    mass_row_ptr = mass_ptr + row * stride_mass_row + kv_head * stride_mass_head
    lanes = tl.arange(0, TILE)
    # The largest key that `wanted` blocks reach. Nothing to search for if none of them is
    # wanted (only NaN is beyond this limit) or all are (no key is below 0).
    threshold = tl.where(wanted > 0, 0, 0x7FFFFFFF)
    search = (wanted > 0) & (wanted < others_end - others_begin)
    bit = 0x40000000
    for _ in range(0, tl.where(search, 31, 0)):
        raised = threshold | bit
        reaching = tl.zeros([TILE], dtype=tl.int32)
        for start in range(others_begin, others_end, TILE):
            blocks = start + lanes
            inside = blocks < others_end
            mass = tl.load(mass_row_ptr + blocks, mask=inside, other=0.0)
            key = mass.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # -0.0 equals 0.0
            reaching += (inside & (key >= raised)).to(tl.int32)
        threshold = tl.where(tl.sum(reaching, axis=0) >= wanted, raised, threshold)
        bit = bit >> 1

    above = tl.zeros([TILE], dtype=tl.int32)
    tied = tl.zeros([TILE], dtype=tl.int32)
    for start in range(others_begin, others_end, TILE):
        blocks = start + lanes
        inside = blocks < others_end
        mass = tl.load(mass_row_ptr + blocks, mask=inside, other=0.0)
        key = mass.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        above += (inside & (key > threshold)).to(tl.int32)
        tied += (inside & (key == threshold)).to(tl.int32)
    # Of equal masses the later blocks win: so many from the start lose.
    tied_losers = tl.sum(tied, axis=0) - (wanted - tl.sum(above, axis=0))

    blocks_row_ptr = blocks_ptr + row * stride_blocks_row + kv_head * stride_blocks_head
    written = 0
    ties_seen = 0
    for start in range(0, num_blocks, TILE):
        blocks = start + lanes
        between = (blocks >= others_begin) & (blocks < others_end)
        mass = tl.load(mass_row_ptr + blocks, mask=between, other=0.0)
        key = mass.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        ties = (between & (key == threshold)).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(ties, axis=0)  # from 1
        chosen = between & ((key > threshold) | ((ties == 1) & (tie_rank > tied_losers)))
        chosen = chosen | (blocks < taken_sinks)
        chosen = chosen | ((blocks >= num_blocks - taken_recent) & (blocks < num_blocks))
        places = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(blocks_row_ptr + places, blocks, mask=chosen & (places < out_width))
        written += tl.sum(chosen.to(tl.int32), axis=0)
        ties_seen += tl.sum(ties, axis=0)
    for start in range(0, out_width, TILE):
        places = start + lanes
        padding = tl.full([TILE], -1, dtype=tl.int32)
        tl.store(blocks_row_ptr + places, padding, mask=(places >= count) & (places < out_width))
    tl.store(counts_ptr + row * stride_count_row + kv_head * stride_count_head, count)
