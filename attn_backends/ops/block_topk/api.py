"""From block masses to a block selection, with forced sink and recent blocks.

``run(block_mass, seq_lens, block_size, budget_blocks, sink_blocks, recent_blocks, out) -> None``

block_mass: ``[num_reqs, num_kv_heads, max_blocks]`` fp32, contiguous (``anchor_decode``).
seq_lens: ``[num_reqs]`` int32, tokens including the current one; at least 1.
block_size: tokens per block.
budget_blocks: ``[num_reqs]`` int32, blocks a KV head of the row may read in all; a budget of at
least the row's blocks selects them all, which is dense attention.
sink_blocks, recent_blocks: first and last blocks that are always among the selected.
out: ``BlockSelection`` buffers for these rows, wide enough for the largest selection; filled
ascending and -1 padded. ``counts`` is contiguous, ``logical_blocks`` in its last dimension.

Order of preference: the last block (it holds the current token), other recent blocks from the
end, sink blocks from the start, then blocks by falling mass, the later one on equal mass.
Selections are exact data movement: implementations agree bit for bit.
"""

from __future__ import annotations

from attn_backends.ops.dispatch import OpImpl


def implementations() -> list[OpImpl]:
    """All implementations that this package ships; nothing heavy is imported."""
    from attn_backends.ops.block_topk.impl import cpu, reference, triton

    return [
        OpImpl("block_topk", name, module.run, module.unsupported_reason)
        for name, module in (("cpu", cpu), ("triton", triton), ("reference", reference))
    ]
