"""KV entries: a layer's KV heads, or some of them, under one retention policy.

To vLLM an entry is a name with a spec; entries of one policy share KV groups and block tables.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvcache.retention import RetentionPolicy


@dataclass(frozen=True)
class KVEntry:
    """What a layer caches under one policy.

    Attributes:
        layer: index of the attention layer.
        heads: its KV heads; None for all of them.
        policy: what of them is kept.
    """

    layer: int
    heads: tuple[int, ...] | None
    policy: RetentionPolicy


def layer_entries(
    policies: Sequence[RetentionPolicy], dropped_layers: Collection[int] = ()
) -> tuple[KVEntry, ...]:
    """One entry per layer.

    Args:
        policies: of each layer.
        dropped_layers: layers that cache nothing.
    """
    return tuple(
        KVEntry(layer, None, policy)
        for layer, policy in enumerate(policies)
        if layer not in dropped_layers
    )


def check_entries(
    entries: Sequence[KVEntry],
    num_layers: int,
    num_kv_heads: int,
    dropped_layers: Collection[int] = (),
) -> None:
    """Whether the entries cover a model, and whether vLLM can give them equal pages.

    Args:
        entries: of all layers, in any order.
        num_layers: attention layers of the model.
        num_kv_heads: of each layer.
        dropped_layers: layers that cache nothing.

    Raises:
        ValueError: a KV head that the model or a dropped layer does not have, one that is in no
            entry or in two, or entries of different sizes.
    """
    wanted = {
        (layer, head)
        for layer in range(num_layers)
        if layer not in dropped_layers
        for head in range(num_kv_heads)
    }
    owners: dict[tuple[int, int], int] = {}
    sizes: dict[int, int] = {}
    for index, entry in enumerate(entries):
        heads = range(num_kv_heads) if entry.heads is None else entry.heads
        sizes.setdefault(len(heads), index)
        for head in heads:
            _own(owners, wanted, (entry.layer, head), index)
    if missing := sorted(wanted - owners.keys()):
        layer, head = missing[0]
        raise ValueError(
            f"no entry has KV head {head} of layer {layer} ({len(missing)} heads are in none); "
            "give each head of a layer that is not dropped one entry"
        )
    if len(sizes) > 1:
        found = ", ".join(f"{size} in entry {index}" for size, index in sizes.items())
        raise ValueError(
            f"entries have different numbers of KV heads ({found}); vLLM's pages are equally "
            "large, so split all layers in the same way"
        )


def _own(
    owners: dict[tuple[int, int], int],
    wanted: set[tuple[int, int]],
    layer_and_head: tuple[int, int],
    index: int,
) -> None:
    layer, head = layer_and_head
    if layer_and_head not in wanted:
        raise ValueError(
            f"entry {index} has KV head {head} of layer {layer}, which the model does not have "
            "or which is dropped; take it out"
        )
    if layer_and_head in owners:
        raise ValueError(
            f"entries {owners[layer_and_head]} and {index} both have KV head {head} of layer "
            f"{layer}; leave it in one of them"
        )
    owners[layer_and_head] = index
