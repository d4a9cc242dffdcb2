"""Start-up decisions of the platform: refuse, prepare, or (non-strict) serve dense, counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attn_backends.adapter.checks import check_method, refuse, unsupported_reasons
from attn_backends.adapter.config import chosen_method, method_config
from attn_backends.methods import load_method
from vllm_ext import metrics

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.vllm_ext")

CPU_BLOCK_TOKENS = 32  # selection is by block: small blocks keep what is read close to the budget


def prepare_config(vllm_config: VllmConfig, device_type: str) -> None:
    """Validates our settings against the complete engine configuration.

    Raises:
        ConfigError: bad settings, or (strict) a combination that no method serves.
    """
    method = chosen_method(vllm_config)
    if method is None:
        return
    metrics.create_folder()
    metrics.export()
    config = method_config(vllm_config, method)
    cache = vllm_config.cache_config
    if device_type == "cpu" and not cache.user_specified_block_size:
        cache.block_size = CPU_BLOCK_TOKENS
    reasons = unsupported_reasons(vllm_config, device_type)
    if reasons and config.strict:
        raise refuse(method, reasons)
    if reasons:
        logger.warning(
            "%s cannot serve this set-up (%s) and strict is off: EVERY ROW IS SERVED DENSE "
            "by stock vLLM",
            method.name,
            "; ".join(reasons),
        )
    check_method(config, cache.block_size)


def select_backend(name: str, selector_config: Any, builtin: Callable[[], str]) -> str:
    """Class path of the backend for one layer.

    Args:
        name: the chosen method.
        selector_config: vLLM's ``AttentionSelectorConfig`` of the layer.
        builtin: gives the stock backend's class path.

    Raises:
        ConfigError: strict, and the layer cannot be served.
    """
    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform

    from attn_backends.adapter import backend, fallback

    vllm_config = get_current_vllm_config()
    method = load_method(name)
    reasons = unsupported_reasons(vllm_config, current_platform.device_type)
    ours: Any = getattr(backend, name)
    reasons += ours.validate_configuration(
        device_capability=current_platform.get_device_capability(), **selector_config._asdict()
    )
    if not reasons:
        return backend.class_path(name)
    if method_config(vllm_config, method).strict:
        raise refuse(method, reasons)
    return fallback.counted_dense(builtin(), name)
