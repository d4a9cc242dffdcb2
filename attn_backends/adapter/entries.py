"""KV heads as KV entries: to vLLM each is a layer with a cache, block table and policy of its own.

Where a method keeps different blocks for different heads of a layer (``KVEntry.heads``), every
entry becomes a small attention layer in vLLM's static forward context. vLLM then asks it for a
spec, puts it into a KV group and binds a cache to it; it is never called. The layer that is called,
the *split* one, names its first entry as ``kv_sharing_target_layer_name``, as dropped layers do and
for as long (dropping.py), so that nothing is allocated for it and it finds metadata.

Proven with vLLM's V1 runner on CPU. Not run on a GPU, and refused under tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from attn_backends.adapter.config import chosen_method, planned_entries
from attn_backends.config import ConfigError
from attn_backends.head_tables import FoldBuffers, HeadTables, HeadTiles
from kvcache.layout import KVOrder, kv_views

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from kvcache.retention import RetentionPolicy


class HeadEntry(AttentionLayerBase):
    """Some KV heads of an attention layer, for vLLM's KV cache management alone.

    Args:
        layer: the split layer.
        heads: its KV heads.
    """

    def __init__(self, layer: Attention, heads: tuple[int, ...]) -> None:
        self.layer_name = entry_name(layer.layer_name, heads)
        self.heads = heads
        self.impl = layer.impl
        # vLLM makes builders by query heads: entries and split layers never share one.
        self.num_heads = layer.num_heads // layer.num_kv_heads * len(heads)
        self.kv_cache = torch.tensor([])
        self._layer = layer

    def get_attn_backend(self) -> type[AttentionBackend]:
        """See ``AttentionLayerBase.get_attn_backend``: the split layer's."""
        return self._layer.get_attn_backend()

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """See ``AttentionLayerBase.get_kv_cache_spec``: the split layer's, of fewer heads."""
        spec: Any = self._layer.get_kv_cache_spec(vllm_config)
        return replace(spec, num_kv_heads=len(self.heads))


class SplitCache:
    """The cache of a split layer: tiles of the pool that its entries' caches lie in.

    Args:
        entries: of the layer, bound to their caches.
        groups: the KV group of each; equal for those of one.
        order: of the elements in a tile.
    """

    def __init__(
        self, entries: Sequence[HeadEntry], groups: Sequence[Hashable], order: KVOrder
    ) -> None:
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        # An entry of each group: what vLLM says of it holds for the group.
        self._spokesmen = tuple(entries[groups.index(group)].layer_name for group in numbers)
        first = entries[0].kv_cache
        block_size, double_head = first.shape[2:]
        tile_elements = block_size * double_head
        by_head: dict[int, tuple[int, int]] = {}  # group and base
        for entry, group in zip(entries, groups, strict=True):
            base = entry.kv_cache.storage_offset() // tile_elements
            for index, head in enumerate(entry.heads):
                by_head[head] = (numbers[group], base + index)
        heads = [by_head[head] for head in sorted(by_head)]
        self._tiles = HeadTiles(
            group_of_head=tuple(group for group, _ in heads),
            tile_base=torch.tensor(
                [base for _, base in heads], dtype=torch.int32, device=first.device
            ),
            tile_stride=first.stride(0) // tile_elements,
            block_size=block_size,
        )
        num_tiles = first.untyped_storage().nbytes() // first.element_size() // tile_elements
        shape = (num_tiles, 1, block_size, double_head)
        strides = (tile_elements, tile_elements, double_head, 1)
        self.views = kv_views(first.as_strided(shape, strides, 0), order)

    def slots(self, slot_mappings: Any) -> torch.Tensor:
        """Where keys go that are folded into tokens of one head; see ``HeadTiles.slots``.

        Args:
            slot_mappings: vLLM's of this step, by name.
        """
        return self._tiles.slots(tuple(slot_mappings[name] for name in self._spokesmen))

    def tables(self, attn_metadata: Any, buffers: FoldBuffers) -> HeadTables:
        """The heads' block tables in this step.

        Args:
            attn_metadata: vLLM's of this step, by name.
            buffers: see ``HeadTables``.
        """
        tables = tuple(attn_metadata[name].block_table for name in self._spokesmen)
        return HeadTables(self._tiles, tables, buffers)


def entry_name(layer_name: str, heads: tuple[int, ...] | None) -> str:
    """vLLM's name for an entry; a number of its own would be taken for a layer index."""
    return layer_name if heads is None else f"{layer_name}.head{heads[0]}"


def policies_by_name(vllm_config: VllmConfig) -> dict[str, RetentionPolicy]:
    """The policy of each entry of this rank, by vLLM's name; empty under a stock backend."""
    method = chosen_method(vllm_config)
    if method is None:
        return {}
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    names = {extract_layer_index(name): name for name in layers}
    entries, *_ = planned_entries(method, vllm_config)
    return {
        entry_name(names[entry.layer], entry.heads): entry.policy
        for entry in entries
        if entry.layer in names
    }


def split_layers(vllm_config: VllmConfig) -> dict[str, tuple[HeadEntry, ...]]:
    """The entries of this rank's split layers, by the layer's name; made on the first call.

    They stand in the static forward context from then on, and the layers' impls know them.
    """
    method = chosen_method(vllm_config)
    if method is None:
        return {}
    context: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    names = {extract_layer_index(name): name for name in layers}
    found: dict[str, list[HeadEntry]] = {}
    for entry in planned_entries(method, vllm_config)[0]:
        if entry.heads is None or entry.layer not in names:
            continue
        layer = layers[names[entry.layer]]
        require_ours(layer, method.name, "split; take it out of full_heads")
        name = entry_name(layer.layer_name, entry.heads)
        if name not in context:
            context[name] = HeadEntry(layer, entry.heads)
        found.setdefault(layer.layer_name, []).append(context[name])
    split = {name: tuple(entries) for name, entries in found.items()}
    for name, entries in split.items():
        layers[name].impl.split(entries)
    return split


def require_ours(layer: Attention, method_name: str, purpose: str) -> None:
    """Refuses a layer that another backend serves.

    Raises:
        ConfigError: names it; ``purpose`` says what it was to be, and what to do.
    """
    from attn_backends.adapter.impl import ExtAttentionImpl

    if not isinstance(layer.impl, ExtAttentionImpl):
        raise ConfigError(
            f"{method_name}: {type(layer.impl).__name__} serves layer {layer.layer_name}, which "
            f"is to be {purpose} in the profile"
        )
