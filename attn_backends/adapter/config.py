"""From vLLM's configuration to ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_backends.config import ConfigError, EngineFacts, MethodConfig, parse_config
from attn_backends.method import Geometry, SparseMethod
from attn_backends.methods import REGISTRY, load_method

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from attn_backends.plan import LayerSchedule
    from kvcache.entries import KVEntry

CONFIG_KEY = "vllm_ext"


def raw_settings(vllm_config: VllmConfig) -> dict[str, Any] | None:
    """What the user wrote under ``vllm_ext``, or None."""
    additional = vllm_config.additional_config
    settings: dict[str, Any] | None = (
        additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
    )
    return settings


def chosen_method(vllm_config: VllmConfig) -> SparseMethod | None:
    """The method that ``--attention-backend`` names, or None for a stock backend.

    Raises:
        ConfigError: settings of ours without a method of ours would be ignored silently.
    """
    backend = vllm_config.attention_config.backend
    name = None if backend is None else backend.name
    if name in REGISTRY:
        return load_method(name)
    if raw_settings(vllm_config) is not None:
        raise ConfigError(
            f"additional_config has vllm_ext settings, but --attention-backend is "
            f"{name or 'not given'}; name one of {', '.join(REGISTRY)}, or drop the settings"
        )
    return None


def method_config(vllm_config: VllmConfig, method: SparseMethod) -> MethodConfig:
    """The method's validated settings.

    Raises:
        ConfigError: see ``parse_config``.
    """
    return parse_config(method.config_cls, raw_settings(vllm_config) or {}, method.name)


def engine_facts(vllm_config: VllmConfig, device_type: str) -> EngineFacts:
    """What settings are checked against, as far as vLLM has decided it.

    Args:
        vllm_config: complete but for what vLLM chooses after it has loaded the model.
        device_type: ``cpu`` or ``cuda``.
    """
    return EngineFacts(
        device_type, vllm_config.cache_config.block_size, vllm_config.parallel_config.world_size
    )


def geometry_of(vllm_config: VllmConfig) -> Geometry:
    """What a method must know of the model, per tensor-parallel rank."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return Geometry(
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=model.get_num_kv_heads(parallel),
        num_query_heads=model.get_num_attention_heads(parallel),
        head_size=model.get_head_size(),
        block_size=vllm_config.cache_config.block_size,
        max_num_reqs=vllm_config.scheduler_config.max_num_seqs,
        max_model_len=model.max_model_len,
        model_path=model.model,
    )


def planned_entries(
    method: SparseMethod, vllm_config: VllmConfig
) -> tuple[tuple[KVEntry, ...], LayerSchedule, Geometry]:
    """What the method caches under this configuration, and for which layers."""
    config, geometry = method_config(vllm_config, method), geometry_of(vllm_config)
    schedule = method.schedule(config, geometry)
    return method.entries(config, schedule, geometry), schedule, geometry
