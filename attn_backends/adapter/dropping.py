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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from attn_backends.adapter.config import chosen_method, geometry_of, method_config
from attn_backends.adapter.entries import require_ours, split_layers
from attn_backends.config import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.vllm_ext")


@contextmanager
def unallocated(vllm_config: VllmConfig) -> Iterator[None]:
    """While it lasts, vLLM sees dropped layers, and those whose heads have caches of their own
    (entries.py), as layers that share another's KV cache.

    Args:
        vllm_config: names the method and its settings; its layers are constructed.

    Raises:
        ConfigError: this rank's layers are all dropped, or a dropped or split one is not served
            by us.
    """
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    targets = {name: entries[0].layer_name for name, entries in split_layers(vllm_config).items()}
    dropped, kept = _dropped_layers(vllm_config, layers)
    targets |= {name: targets.get(kept, kept) for name in dropped}
    for name, target in targets.items():
        layers[name].kv_sharing_target_layer_name = target
    try:
        yield
    finally:
        for name in targets:
            layers[name].kv_sharing_target_layer_name = None


def _dropped_layers(
    vllm_config: VllmConfig, layers: Mapping[str, Attention]
) -> tuple[list[str], str]:
    """This rank's dropped layers, and the kept layer whose KV group they join."""
    method = chosen_method(vllm_config)
    if method is None:
        return [], ""
    schedule = method.schedule(method_config(vllm_config, method), geometry_of(vllm_config))
    if not schedule.dropped:
        return [], ""
    index_of = {name: extract_layer_index(name) for name in layers}
    dropped = [name for name, index in index_of.items() if index in schedule.dropped]
    kept = [name for name in layers if name not in dropped]
    if not kept:
        raise ConfigError(
            f"{method.name}: the profile drops every layer of this pipeline stage "
            f"({sorted(index_of.values())}); take one out of drop_layers"
        )
    for name in dropped:
        require_ours(layers[name], method.name, "dropped; take it out of drop_layers")
    if not all(layers[name].impl.is_dropped for name in dropped):
        _log(method.name, [layers[name] for name in dropped])
    for name in dropped:
        layers[name].impl.is_dropped = True
    return dropped, kept[0]


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
