"""KV heads as KV entries: to vLLM each is a layer with a cache, block table and policy of its own.

Where a method keeps different blocks for different heads of a layer (``KVEntry.heads``), every
entry becomes a small attention layer in vLLM's static forward context. vLLM then asks it for a
spec, puts it into a KV group and binds a cache to it; it is never called. The layer that is called,
the *split* one, names its first entry as ``kv_sharing_target_layer_name``, as dropped layers do and
for as long (dropping.py), so that nothing is allocated for it and it finds metadata.

Proven with vLLM's V1 runner on CPU, run with V2 on one H100, and refused under tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from attn_backends.adapter.config import chosen_method, planned_entries
from attn_backends.config import ConfigError
from attn_backends.head_tables import HeadPlaces, HeadTables
from attn_backends.split_step import SplitRows
from attn_backends.warm_up import WarmHeads
from kvcache.layout import KVOrder, kv_views

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from attn_backends.adapter.metadata import ExtMetadata
    from attn_backends.method import Geometry
    from kvcache.retention import RetentionPolicy


class HeadEntry(AttentionLayerBase):
    """Some KV heads of an attention layer, for vLLM's KV cache management alone.

    Args:
        layer: the split layer.
        heads: its KV heads.
    """

    def __init__(self, layer: Attention, heads: tuple[int, ...]) -> None:
        self.layer_name = entry_name(layer.layer_name, heads)
        self.split_layer = layer.layer_name
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


class SplitEngine:
    """What the split layers of an engine share: the KV groups of their entries, and the rows of a
    pass through the model by head, made by the first layer that asks.

    Args:
        geometry: of the split layers.
        max_num_tokens: of a step.
    """

    def __init__(self, geometry: Geometry, max_num_tokens: int) -> None:
        self._geometry, self._max_num_tokens = geometry, max_num_tokens
        self._group_of: dict[str, int] = {}  # by the entry's name
        self._spokesmen: list[str] = []  # an entry of each group: what vLLM says of it holds for it
        self._shared: HeadTables | None = None
        self._forward: ForwardContext | None = None  # of the pass that the rest is of
        self._rows: SplitRows | None = None
        self._slots: torch.Tensor | None = None

    def add_group(self, names: Sequence[str]) -> None:
        """Told by the builder of each group of entries, when vLLM makes it."""
        if names[0] in self._group_of:  # the KV cache is made anew
            self._group_of, self._spokesmen, self._shared = {}, [], None
        self._group_of |= dict.fromkeys(names, len(self._spokesmen))
        self._spokesmen.append(names[0])

    def cache_of(self, entries: Sequence[HeadEntry], order: KVOrder) -> SplitCache:
        """The cache of a layer whose entries are bound.

        Args:
            entries: of the layer.
            order: of the elements in a tile.
        """
        first = entries[0].kv_cache
        block_size, double_head = first.shape[2:]
        tile_elements = block_size * double_head
        if self._shared is None:
            self._shared = shared_head_tables(
                self._geometry,
                len(self._spokesmen),
                tile_stride=first.stride(0) // tile_elements,
                max_num_tokens=self._max_num_tokens,
                device=first.device,
            )
        by_head: dict[int, tuple[int, int]] = {}  # group and first tile
        for entry in entries:
            base = entry.kv_cache.storage_offset() // tile_elements
            for index, head in enumerate(entry.heads):
                by_head[head] = (self._group_of[entry.layer_name], base + index)
        groups, bases = zip(*(by_head[head] for head in sorted(by_head)), strict=True)
        places = HeadPlaces(groups, bases, block_size, first.device)
        num_tiles = first.untyped_storage().nbytes() // first.element_size() // tile_elements
        shape = (num_tiles, 1, block_size, double_head)
        strides = (tile_elements, tile_elements, double_head, 1)
        return SplitCache(places, kv_views(first.as_strided(shape, strides, 0), order))

    def warm_heads(self, block_tables: Mapping[str, torch.Tensor]) -> WarmHeads:
        """What the split layers' warm-up shares; one of their caches has been looked at.

        Args:
            block_tables: of every KV group, by the name of each layer or entry in it.
        """
        return WarmHeads(self._tables, [block_tables[name] for name in self._spokesmen])

    def rows(self, step: ExtMetadata) -> SplitRows:
        """The step's rows by head."""
        self._begin()
        if self._rows is None:
            metadata: Any = get_forward_context().attn_metadata
            tables = [metadata[name].block_table for name in self._spokesmen]
            self._rows = SplitRows.of(step.batch, self._tables, tables)
        return self._rows

    def slots(self) -> torch.Tensor:
        """See ``HeadTables.write_slots``: of the step's tokens."""
        self._begin()
        if self._slots is None:
            mappings: Any = get_forward_context().slot_mapping
            self._slots = self._tables.write_slots([mappings[name] for name in self._spokesmen])
        return self._slots

    @property
    def _tables(self) -> HeadTables:
        if self._shared is None:
            raise RuntimeError("a split layer was called before its cache was looked at")
        return self._shared

    def _begin(self) -> None:
        # Not by plan: vLLM may run a step's metadata twice, the second time into a graph.
        context = get_forward_context()
        if context is not self._forward:
            self._forward, self._rows, self._slots = context, None, None


def shared_head_tables(
    geometry: Geometry,
    num_groups: int,
    *,
    tile_stride: int,
    max_num_tokens: int,
    device: torch.device,
) -> HeadTables:
    """Of an engine's split layers.

    Args:
        geometry: of the layers.
        num_groups: KV groups of their entries.
        tile_stride: tiles from a block of a head to its next.
        max_num_tokens: of a step.
        device: of the buffers.
    """
    return HeadTables.of(
        geometry.num_kv_heads,
        num_groups,
        geometry.block_size,
        tile_stride,
        max_num_reqs=geometry.max_num_reqs,
        max_num_tokens=max_num_tokens,
        max_blocks=-(-geometry.max_model_len // geometry.block_size),
        device=device,
    )


@dataclass(frozen=True)
class SplitCache:
    """The cache of one split layer: tiles of the pool that its entries' caches lie in."""

    places: HeadPlaces
    views: tuple[torch.Tensor, torch.Tensor]  # keys and values of the whole pool


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
