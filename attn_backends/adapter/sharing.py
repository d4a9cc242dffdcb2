"""One selector for all KV groups of an engine.

vLLM makes a metadata builder for every group of layers with the same KV cache, and splits even
layers of one kind into several groups; an anchor and the layers that reuse its selection may
then have different builders. What an anchor writes must be what they read, so their builders
share the selector that owns the buffers. That is sound because all groups serve the same rows
in the same order, logical block indices are valid in each, and every builder of a step has run
before the first layer does.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from attn_backends.config import ConfigError
from attn_backends.method import Geometry, Selector

# By an attention layer of the engine: it lives as long as the engine, and no two share one.
_SELECTORS: WeakKeyDictionary[torch.nn.Module, tuple[Geometry, Selector]] = WeakKeyDictionary()


def shared_selector(
    owner: torch.nn.Module, geometry: Geometry, make: Callable[[], Selector]
) -> Selector:
    """The engine's selector, made on first use.

    Args:
        owner: any module of the engine, the same one for all its builders.
        geometry: of the builder's layers.
        make: makes the selector.

    Raises:
        ConfigError: layers of another shape cannot share a selection.
    """
    known, selector = _SELECTORS.get(owner, (geometry, None))
    if selector is None:
        selector = make()
        _SELECTORS[owner] = (geometry, selector)
    for field in ("num_kv_heads", "block_size"):
        here, there = getattr(geometry, field), getattr(known, field)
        if here != there:
            raise ConfigError(
                f"layers of {field} {here} and {there} cannot share a selection of KV blocks; "
                "this model needs --attention-backend SPARSE_FULL or SINK_WINDOW"
            )
    return selector
