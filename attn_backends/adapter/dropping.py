"""Layers without attention (``LayerRole.DROP``): vLLM allocates no KV cache for them.

The device is vLLM's cross-layer KV sharing: a layer that names another one as
``kv_sharing_target_layer_name`` gets no spec, is bound to the other's cache and joins its KV
group, and so finds metadata in every step. It really shares nothing: a dropped layer's impl
neither reads nor writes.

The name is set only while vLLM decides about the KV cache, and taken back afterwards: the layer's
``forward``, which torch.compile traces, branches on it, and a compiled graph is cached under a
key that does not know the content of a profile. The graph is thus the same whatever is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from attn_backends.adapter.config import chosen_method, geometry_of, method_config
from attn_backends.adapter.impl import ExtAttentionImpl
from attn_backends.config import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.vllm_ext")


@contextmanager
def unallocated(vllm_config: VllmConfig) -> Iterator[None]:
    """While it lasts, vLLM sees the dropped layers as layers that share another's KV cache.

    Args:
        vllm_config: names the method and its settings; its layers are constructed.

    Raises:
        ConfigError: this rank's layers are all dropped, or a dropped one is not served by us.
    """
    dropped, targets = _dropped_layers(vllm_config)
    for layer, target in zip(dropped, targets, strict=True):
        layer.kv_sharing_target_layer_name = target
    try:
        yield
    finally:
        for layer in dropped:
            layer.kv_sharing_target_layer_name = None


def _dropped_layers(vllm_config: VllmConfig) -> tuple[list[Attention], list[str]]:
    """This rank's dropped layers, and for each the kept layer whose KV group it joins."""
    method = chosen_method(vllm_config)
    if method is None:
        return [], []
    schedule = method.schedule(method_config(vllm_config, method), geometry_of(vllm_config))
    if not schedule.dropped:
        return [], []
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    index_of = {name: extract_layer_index(name) for name in layers}
    kept = [name for name, index in index_of.items() if index not in schedule.dropped]
    dropped = [layer for name, layer in layers.items() if name not in kept]
    if not kept:
        raise ConfigError(
            f"{method.name}: the profile drops every layer of this pipeline stage "
            f"({sorted(index_of.values())}); take one out of drop_layers"
        )
    for layer in dropped:
        _require_ours(layer, method.name)
    if not all(layer.impl.is_dropped for layer in dropped):
        _log(method.name, dropped)
    for layer in dropped:
        layer.impl.is_dropped = True
    return dropped, [kept[0]] * len(dropped)


def _require_ours(layer: Attention, method_name: str) -> None:
    if not isinstance(layer.impl, ExtAttentionImpl):
        raise ConfigError(
            f"{method_name}: layer {layer.layer_name} is to be dropped, but "
            f"{type(layer.impl).__name__} serves it; take it out of the profile's drop_layers"
        )


def _log(method_name: str, dropped: list[Attention]) -> None:
    kv_bytes = sum(
        2 * layer.num_kv_heads * layer.head_size * layer.kv_cache_torch_dtype.itemsize
        for layer in dropped
    )
    logger.info(
        "%s: layers %s are dropped: no attention and no KV cache, %d bytes less per token",
        method_name,
        [extract_layer_index(layer.layer_name) for layer in dropped],
        kv_bytes,
    )
