"""Resolution of the ops with the engine's own among them; shared by builder and layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from attn_backends.adapter import engine_ops
from attn_backends.adapter.config import chosen_method, geometry_of, method_config
from attn_backends.config import ConfigError
from attn_backends.ops.dispatch import OpContext
from attn_backends.ops.resolution import ORDER_OF_DEVICE, Ops, resolve_ops
from kvcache.layout import PagedKVLayout

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

    from attn_backends.method import Geometry
    from kvcache.spans import Span


_IN_USE: dict[tuple[OpContext, str], Ops] = {}


def engine_and_our_ops(context: OpContext, kernel: str) -> Ops:
    """See ``resolve_ops``; once for each geometry."""
    if (context, kernel) not in _IN_USE:
        engine = engine_ops.implementations(context.device_type)
        _IN_USE[context, kernel] = resolve_ops(context, kernel, engine)
    return _IN_USE[context, kernel]


def ops_in_use() -> dict[OpContext, Ops]:
    """What layers of this process were given, for reports."""
    return {context: ops for (context, _), ops in _IN_USE.items()}


def op_context(
    spec: AttentionSpec,
    num_query_heads: int,
    device: torch.device,
    spans: Collection[tuple[Span, ...]] = (),
    rows_differ: bool = False,
) -> OpContext:
    """What the ops must serve for layers of this KV spec.

    Args:
        spec: of the layers.
        num_query_heads: of a layer.
        device: of the cache.
        spans: of the layers with a rule, by KV or query head; none: no layer has one.
        rows_differ: some rows see everything instead.
    """
    layout = _layout(spec, spec.dtype, device.type)
    are_plain = _are_plain(spans) and not rows_differ
    return OpContext(layout, num_query_heads, device.type, bool(spans), are_plain)


def _layout(shape: AttentionSpec | Geometry, dtype: torch.dtype, device_type: str) -> PagedKVLayout:
    return PagedKVLayout(
        num_blocks=1,  # implementations do not depend on the pool's size
        block_size=shape.block_size,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        dtype=dtype,
        order=ORDER_OF_DEVICE[device_type],
    )


def _are_plain(spans: Collection[tuple[Span, ...]]) -> bool:
    """Whether every layer has one window, the same at every position."""
    return all(
        len({*heads}) == 1 and heads[0].window_tokens is not None for heads in spans
    ) and bool(spans)


def unserved_reasons(vllm_config: VllmConfig, device_type: str) -> list[str]:
    """Why ops would be left without an implementation, asked before anything is loaded.

    On CPUs the reference serves what nothing else does. On CUDA nothing may fall to it.

    Args:
        vllm_config: complete; it names one of our methods.
        device_type: ``cpu`` or ``cuda``.
    """
    method = chosen_method(vllm_config)
    if device_type == "cpu" or vllm_config.model_config is None or method is None:
        return []
    geometry, dtype = geometry_of(vllm_config), vllm_config.model_config.dtype
    layout = _layout(geometry, dtype, device_type)
    context = OpContext(layout, geometry.num_query_heads, device_type, with_rule=True)
    kernel = method_config(vllm_config, method).kernel
    if kernel == "reference" and not vllm_config.model_config.enforce_eager:
        return ["--kernel reference without --enforce-eager (it waits for the GPU in every row)"]
    try:
        # Not the cached one: vLLM's configuration, which may name a version, is not set yet.
        resolve_ops(context, kernel, engine_ops.implementations(device_type))
    except ConfigError as error:
        return [
            f"heads of {geometry.head_size} in KV blocks of {geometry.block_size} tokens of "
            f"{dtype} ({error})"
        ]
    return []
