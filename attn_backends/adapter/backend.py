"""vLLM attention backends, one per registered method, made from the registry.

``attn_backends.adapter.backend.<NAME>`` is the class path that the plugin registers; the
class is created on first access, so a new method needs no line here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from attn_backends.adapter.checks import MIN_BLOCK_TOKENS
from attn_backends.adapter.impl import ExtAttentionImpl
from attn_backends.adapter.metadata import ExtMetadataBuilder
from attn_backends.methods import REGISTRY, load_method

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType


class ExtAttentionBackend(AttentionBackend):
    """What every method's backend has in common."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(MIN_BLOCK_TOKENS[current_platform.device_type])]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0 and head_size <= 256

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        # vLLM's HND: within a block, heads outside tokens. A (block, head) tile, what a selection
        # reads, is then one piece of memory: the CPU kernels need that, and on GPUs it is 8 KiB
        # (16 tokens of 128 in 16 bit) where vLLM's default, NHD, would scatter 16 pieces of 512
        # bytes. FlashAttention takes pages of any strides, and head tables count in tiles.
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type[ExtAttentionImpl]:
        return ExtAttentionImpl


def _make_backend(name: str) -> type[ExtAttentionBackend]:
    builder = type(f"{name}_Builder", (ExtMetadataBuilder,), {"METHOD": load_method(name)})
    members = {
        "__module__": __name__,
        "get_name": staticmethod(lambda: name),
        "get_builder_cls": staticmethod(lambda: builder),
    }
    return type(name, (ExtAttentionBackend,), members)


def __getattr__(name: str) -> type[ExtAttentionBackend]:
    if name not in REGISTRY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    backend = globals()[name] = _make_backend(name)
    return backend


def class_path(name: str) -> str:
    """The class path of a method's backend, for vLLM's registry."""
    return f"{__name__}.{name}"
