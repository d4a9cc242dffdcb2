"""Oracle of ``cache_write``: index assignment."""

from __future__ import annotations

import torch

from attn_backends.ops.dispatch import OpContext


def run(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See ``api.py``."""
    block_size = key_cache.shape[2]
    valid = slot_mapping >= 0
    slots = slot_mapping[valid]
    physical_blocks, offsets = slots // block_size, slots % block_size
    key_cache[physical_blocks, :, offsets] = key[: len(valid)][valid]
    value_cache[physical_blocks, :, offsets] = value[: len(valid)][valid]


def unsupported_reason(context: OpContext) -> str | None:
    """Works everywhere."""
    return None
