"""Resolution of the ops with the engine's own among them; shared by builder and layers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from attn_backends.adapter import engine_ops
from attn_backends.ops.dispatch import OpContext
from attn_backends.ops.resolution import ORDER_OF_DEVICE, Ops, resolve_ops
from kvcache.layout import PagedKVLayout

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import AttentionSpec


@functools.cache
def engine_and_our_ops(context: OpContext, kernel: str) -> Ops:
    """See ``resolve_ops``; once for each geometry."""
    return resolve_ops(context, kernel, [engine_ops.paged_attention()])


def op_context(
    spec: AttentionSpec, num_query_heads: int, device: torch.device, with_rule: bool
) -> OpContext:
    """What the ops must serve for layers of this KV spec."""
    layout = PagedKVLayout(
        num_blocks=1,  # implementations do not depend on the pool's size
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=spec.dtype,
        order=ORDER_OF_DEVICE[device.type],
    )
    return OpContext(layout, num_query_heads, device.type, with_rule)
