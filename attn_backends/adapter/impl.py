"""vLLM's per-layer attention implementation: executes the plan."""

from __future__ import annotations

from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from attn_backends.adapter.entries import HeadEntry, SplitCache, SplitEngine
from attn_backends.adapter.metadata import ExtMetadata
from attn_backends.adapter.ops import engine_and_our_ops
from attn_backends.config import ConfigError
from attn_backends.head_tables import fold_keys
from attn_backends.ops.dispatch import OpContext, OpImpl
from attn_backends.ops.resolution import ORDER_OF_DEVICE
from attn_backends.split_step import SplitLayerStep
from kvcache.layout import PagedKVLayout, kv_views

SKIPPED_SLOT = -1  # cache_write leaves such a token out


class ExtAttentionImpl(AttentionImpl[ExtMetadata]):
    """One attention layer.

    Raises:
        ConfigError: the layer has a feature that our kernels would ignore.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        checks = {
            "ALiBi": alibi_slopes is not None,
            "sliding-window layers of the model itself": sliding_window is not None,
            f"KV cache dtype {kv_cache_dtype}": kv_cache_dtype != "auto",
            "attention logit soft-capping": bool(logits_soft_cap),
            f"attention type {attn_type}": attn_type != AttentionType.DECODER,
            "layers that share the KV cache of others": kv_sharing_target_layer_name is not None,
            **{f"layer option {key}": value is not None for key, value in extra.items()},
        }
        reasons = [reason for reason, present in checks.items() if present]
        if reasons:
            raise ConfigError(f"this attention layer needs {'; '.join(reasons)}: not supported")
        self.is_dropped = False  # set by dropping.py: attends nothing, owns no KV cache
        self._kernel = _configured_kernel()
        self._cache_write: OpImpl
        # The cache that was bound last, and what is made of it.
        self._bound: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._bound_split: tuple[torch.Tensor, SplitCache] | None = None
        self._entries: tuple[HeadEntry, ...] = ()  # where heads have caches of their own

    def split(self, entries: tuple[HeadEntry, ...]) -> None:
        """The layer's heads are cached in these entries, whose caches are not bound yet."""
        self._entries, self._bound_split = entries, None

    @property
    def is_split(self) -> bool:
        """Whether heads have caches of their own."""
        return bool(self._entries)

    def unbind(self) -> None:
        """Lets go of the cache; the next step makes views of the one that is bound then."""
        self._bound = self._bound_split = None

    def cache_views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of ``kv_cache``, of a layer that is not split."""
        # The engine binds one cache tensor per layer and keeps it; the views are made once.
        if self._bound is None or kv_cache is not self._bound[0]:
            self._cache_write = self._writer(kv_cache, self.num_heads)
            views = kv_views(kv_cache, ORDER_OF_DEVICE[kv_cache.device.type])
            self._bound = kv_cache, views
        return self._bound[1]

    def _writer(self, kv_cache: torch.Tensor, num_query_heads: int) -> OpImpl:
        _num_blocks, num_kv_heads, block_size, double_head = kv_cache.shape
        device_type = kv_cache.device.type
        order = ORDER_OF_DEVICE[device_type]
        layout = PagedKVLayout(1, block_size, num_kv_heads, double_head // 2, kv_cache.dtype, order)
        context = OpContext(layout, num_query_heads, device_type, with_rule=False)
        return engine_and_our_ops(context, self._kernel).cache_write

    def split_cache(self, kv_cache: torch.Tensor, split: SplitEngine) -> SplitCache:
        """The tiles of a split layer's heads; ``kv_cache`` is its first entry's."""
        if self._bound_split is None or kv_cache is not self._bound_split[0]:
            cache = split.cache_of(self._entries, ORDER_OF_DEVICE[kv_cache.device.type])
            group_size = self.num_heads // self.num_kv_heads
            self._cache_write = self._writer(kv_cache[:, :1], group_size)
            self._bound_split = kv_cache, cache
        return self._bound_split[1]

    def write_nothing(self, kv_cache: torch.Tensor, num_tokens: int) -> None:
        """Launches ``cache_write`` as a step of so many tokens does, with slots of padding alone.
        The cache has been looked at.
        """
        split = self._bound_split
        views = self.cache_views(kv_cache) if split is None else split[1].views
        _, num_kv_heads, _, head_size = views[0].shape  # a tile has one head: heads are rows
        num_rows = num_tokens * self.num_kv_heads // num_kv_heads
        keys = kv_cache.new_zeros(num_rows, num_kv_heads, head_size)
        slots = torch.full((num_rows,), SKIPPED_SLOT, device=kv_cache.device)
        self._cache_write.run(keys, keys, *views, slots)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes this step's keys and values; ``[num_tokens, num_kv_heads, head_size]``."""
        if self.is_dropped:
            return  # ``kv_cache`` is another layer's
        if not self._entries:
            views = self.cache_views(kv_cache)
            self._cache_write.run(key, value, *views, slot_mapping)
            return
        metadata: Any = get_forward_context().attn_metadata
        if metadata is None:
            return  # a dummy run: nothing is to be written, and nobody says where blocks lie
        step: ExtMetadata = metadata[self._entries[0].split_layer]
        cache = self.split_cache(kv_cache, step.split)
        slots = cache.places.slots(step.split.slots())
        self._cache_write.run(fold_keys(key), fold_keys(value), *cache.views, slots)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ExtMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step.

        Args:
            layer: the vLLM layer; its name selects the plan.
            query: ``[num_tokens, num_heads, head_size]``, possibly padded at the end.
            key, value: unused, already in the cache.
            kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``; of a layer whose
                heads have caches of their own, the first one's.
            attn_metadata: None while the engine profiles.
            output: like ``query``; written in place.
            output_scale, output_block_scale: fused quantisation, not supported.
        """
        if attn_metadata is None or self.is_dropped:
            return output.zero_()
        if not self._entries:
            views = self.cache_views(kv_cache)
            attn_metadata.step_of(layer.layer_name, views, self.scale).attend(query, output)
            return output
        cache = self.split_cache(kv_cache, attn_metadata.split)
        step = attn_metadata.step_of(layer.layer_name, cache.views, self.scale)
        rows = attn_metadata.split.rows(attn_metadata)
        SplitLayerStep(step, rows, cache.places).attend(query, output)
        return output


def _configured_kernel() -> str:
    from vllm.config import get_current_vllm_config

    from attn_backends.adapter.config import chosen_method, method_config

    vllm_config = get_current_vllm_config()
    method = chosen_method(vllm_config)
    return "auto" if method is None else method_config(vllm_config, method).kernel
