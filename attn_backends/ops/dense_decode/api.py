"""Decode attention (one query token per row) over all kept blocks.

``run(query, key_cache, value_cache, batch, scale, out) -> None``

query, out: ``[num_reqs, num_query_heads, head_size]``, contiguous per row.
key_cache, value_cache: ``[num_blocks, num_kv_heads, block_size, head_size]`` strided views.
batch: ``PagedBatch`` with one query token per row; ``seq_lens`` includes it.
scale: factor on the logits.

An op of its own since engines have a kernel for it. Ours is ``anchor_decode`` without masses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from attn_backends.batch import PagedBatch
from attn_backends.ops.dispatch import OpImpl


def implementations() -> list[OpImpl]:
    """All implementations that this package ships; nothing heavy is imported."""
    from attn_backends.ops.anchor_decode import api

    return [
        OpImpl("dense_decode", impl.name, _without_masses(impl.run), impl.unsupported_reason)
        for impl in api.implementations()
    ]


def _without_masses(anchor_decode: Callable[..., None]) -> Callable[..., None]:
    def run(
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        anchor_decode(query, key_cache, value_cache, batch, scale, out, None)

    return run
