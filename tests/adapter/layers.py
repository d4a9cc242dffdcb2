"""Attention layers as vLLM has them when it asks about the KV cache, without weights."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec


def layer_name(index: int) -> str:
    """As models with ``model.layers`` name them."""
    return f"model.layers.{index}.self_attn.attn"


def attention_layer(index: int, impl_class: type, num_kv_heads: int = 2) -> Any:
    """A layer of heads of 64 in fp32, two query heads per KV head, served by ``impl_class``."""
    layer: Any = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    layer.layer_name = layer_name(index)
    layer.impl = impl_class.__new__(impl_class)
    layer.impl.is_dropped = False
    layer.kv_sharing_target_layer_name = None
    layer.num_heads, layer.num_kv_heads = 2 * num_kv_heads, num_kv_heads
    layer.head_size, layer.kv_cache_torch_dtype = 64, torch.float32
    spec = FullAttentionSpec(
        block_size=32, num_kv_heads=num_kv_heads, head_size=64, dtype=torch.float32
    )
    layer.get_kv_cache_spec = lambda vllm_config: spec
    return layer
