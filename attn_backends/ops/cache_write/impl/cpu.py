"""``cache_write`` in C++ (attn_backends/native/kernels.cpp)."""

from __future__ import annotations

import torch

from attn_backends.ops.native_support import unsupported_reason

__all__ = ["run", "unsupported_reason"]


def run(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See ``api.py``."""
    torch.ops.vllm_ext.cache_write(key, value, key_cache, value_cache, slot_mapping)
