"""Triton implementation of ``cache_write``.

One program copies the keys and values of one token, all KV heads at once, to the token's
slot. The strides of both cache views are arguments, so every ``KVOrder`` works. Values
are moved, never converted: the result is bit exact.

Proven in Triton's interpreter; run on an H200 at commit fa7282f (docs/results.md).
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch

from attn_backends.ops.dispatch import OpContext

if TYPE_CHECKING:
    import triton
    import triton.language as tl


def run(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See ``api.py``."""
    num_tokens = slot_mapping.shape[0]
    if num_tokens == 0:
        return
    kernel = _kernel()
    _, num_kv_heads, block_size, head_size = key_cache.shape
    kernel[(num_tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        *key_cache.stride(),
        *value_cache.stride(),
        NUM_KV_HEADS=num_kv_heads,
        HEADS_PAD=triton.next_power_of_2(num_kv_heads),
        HEAD_SIZE=head_size,
        HEAD_PAD=triton.next_power_of_2(head_size),
        BLOCK_SIZE=block_size,
    )


def unsupported_reason(context: OpContext) -> str | None:
    """Any head size, block size and dtype, wherever Triton runs."""
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

    Triton looks names up in the globals of the kernel, hence ``global``.
    """
    global triton, tl
    import triton
    import triton.language as tl

    return triton.jit(_cache_write_kernel)


def _cache_write_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_key_cache_block,
    stride_key_cache_head,
    stride_key_cache_token,
    stride_key_cache_dim,
    stride_value_cache_block,
    stride_value_cache_head,
    stride_value_cache_token,
    stride_value_cache_dim,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # A prefill of many tokens times a wide row overflows int32.
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot < 0:
        return
    physical_block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE

    heads = tl.arange(0, HEADS_PAD)[:, None]  # [HEADS_PAD, 1]
    dims = tl.arange(0, HEAD_PAD)[None, :]  # [1, HEAD_PAD]
    mask = (heads < NUM_KV_HEADS) & (dims < HEAD_SIZE)  # [HEADS_PAD, HEAD_PAD]

    key_tile = tl.load(
        key_ptr + token * stride_key_token + heads * stride_key_head + dims, mask=mask
    )
    key_slot = physical_block * stride_key_cache_block + offset * stride_key_cache_token
    tl.store(
        key_cache_ptr + key_slot + heads * stride_key_cache_head + dims * stride_key_cache_dim,
        key_tile,
        mask=mask,
    )
    value_tile = tl.load(
        value_ptr + token * stride_value_token + heads * stride_value_head + dims, mask=mask
    )
    value_slot = physical_block * stride_value_cache_block + offset * stride_value_cache_token
    tl.store(
        value_cache_ptr
        + value_slot
        + heads * stride_value_cache_head
        + dims * stride_value_cache_dim,
        value_tile,
        mask=mask,
    )
