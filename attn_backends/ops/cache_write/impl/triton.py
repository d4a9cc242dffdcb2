"""Triton implementation of ``cache_write``.

One program copies the keys and values of a few tokens, all KV heads at once, to the tokens' slots.
The strides of both cache views are known to the kernel, so every ``KVOrder`` works. Values are
moved, never converted: the result is bit exact.

Proven in Triton's interpreter and compiled for sm_80 and sm_90 without a device; this version has
not run on a GPU (its predecessor has: docs/results.md).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from attn_backends.ops import triton_support as support
from attn_backends.ops.dispatch import OpContext
from attn_backends.ops.triton_support import Launch

if TYPE_CHECKING:
    import triton.language as tl

ELEMENTS_PER_PROGRAM = 2048  # two vectors of 16 bytes of each thread, in 16 bit


def run(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See ``api.py``."""
    if slot_mapping.shape[0] == 0:
        return
    support.start(_kernels(), launches(key, value, key_cache, value_cache, slot_mapping))


def launches(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> list[Launch]:
    """What ``run`` launches; see ``api.py``."""
    num_tokens = slot_mapping.shape[0]
    _, num_kv_heads, block_size, head_size = key_cache.shape
    heads_pad, head_pad = support.power_of_two(num_kv_heads), support.power_of_two(head_size)
    tokens = max(1, ELEMENTS_PER_PROGRAM // (heads_pad * head_pad))
    launch = Launch(
        "_cache_write_kernel",
        (-(-num_tokens // tokens),),
        (
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            num_tokens,
            key.stride(0),
            value.stride(0),
        ),
        {
            "STRIDE_IN_KEY_HEAD": key.stride(1),
            "STRIDE_IN_VALUE_HEAD": value.stride(1),
            **support.cache_strides(key_cache, value_cache),
            "TOKENS": tokens,
            "NUM_KV_HEADS": num_kv_heads,
            "HEADS_PAD": heads_pad,
            "HEAD_SIZE": head_size,
            "HEAD_PAD": head_pad,
            "BLOCK_SIZE": block_size,
        },
    )
    return [launch]


def unsupported_reason(context: OpContext) -> str | None:
    """Any head size, block size and dtype, wherever Triton runs."""
    return support.unsupported_reason(context, _kernels, computes=False)


@functools.cache
def _kernels() -> dict[str, Any]:
    """The compiled kernel; the first call imports Triton, so that importing us does not.

    Triton looks names up in the globals of the kernels, hence ``global``. Another number of tokens
    is no reason to compile anew.
    """
    global tl
    import triton
    import triton.language as tl

    kernel = triton.jit(_cache_write_kernel, do_not_specialize=["num_tokens"])
    return {"_cache_write_kernel": kernel}


def _cache_write_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    num_tokens,
    stride_key_token,
    stride_value_token,
    STRIDE_IN_KEY_HEAD: tl.constexpr,
    STRIDE_IN_VALUE_HEAD: tl.constexpr,
    STRIDE_KEY_BLOCK: tl.constexpr,
    STRIDE_KEY_HEAD: tl.constexpr,
    STRIDE_KEY_TOKEN: tl.constexpr,
    STRIDE_KEY_DIM: tl.constexpr,
    STRIDE_VALUE_BLOCK: tl.constexpr,
    STRIDE_VALUE_HEAD: tl.constexpr,
    STRIDE_VALUE_TOKEN: tl.constexpr,
    STRIDE_VALUE_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    lanes = tl.arange(0, TOKENS * HEADS_PAD)  # pairs of a token and a head
    # A prefill of many tokens times a wide row overflows int32, and so do slots.
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + lanes // HEADS_PAD
    heads = (lanes % HEADS_PAD).to(tl.int64)
    slots = tl.load(slot_mapping_ptr + tokens, mask=tokens < num_tokens, other=-1).to(tl.int64)
    dims = tl.arange(0, HEAD_PAD)
    mask = ((slots >= 0) & (heads < NUM_KV_HEADS))[:, None] & (dims < HEAD_SIZE)[None, :]
    slots = tl.maximum(slots, 0)
    physical_blocks = slots // BLOCK_SIZE
    offsets = slots % BLOCK_SIZE

    keys_from = tokens * stride_key_token + heads * STRIDE_IN_KEY_HEAD
    values_from = tokens * stride_value_token + heads * STRIDE_IN_VALUE_HEAD
    keys_to = (
        physical_blocks * STRIDE_KEY_BLOCK + heads * STRIDE_KEY_HEAD + offsets * STRIDE_KEY_TOKEN
    )
    values_to = (
        physical_blocks * STRIDE_VALUE_BLOCK
        + heads * STRIDE_VALUE_HEAD
        + offsets * STRIDE_VALUE_TOKEN
    )
    keys = tl.load(key_ptr + keys_from[:, None] + dims[None, :], mask=mask)
    values = tl.load(value_ptr + values_from[:, None] + dims[None, :], mask=mask)
    tl.store(key_cache_ptr + keys_to[:, None] + dims[None, :] * STRIDE_KEY_DIM, keys, mask=mask)
    tl.store(
        value_cache_ptr + values_to[:, None] + dims[None, :] * STRIDE_VALUE_DIM, values, mask=mask
    )
