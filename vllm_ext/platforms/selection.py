"""Start-up decisions of the platform: refuse, prepare, or (non-strict) serve dense, counted."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from attn_backends.adapter.checks import refuse, unsupported_reasons
from attn_backends.adapter.config import (
    chosen_method,
    engine_facts,
    geometry_of,
    method_config,
    planned_entries,
)
from attn_backends.adapter.ops import unserved_reasons
from attn_backends.adapter.requests import KEYS, parse_options
from attn_backends.config import ConfigError
from attn_backends.drafting import check_drafting
from attn_backends.method import SparseMethod
from attn_backends.methods import load_method
from attn_backends.plan import CHOOSING_ROLES
from kvcache.entries import check_entries
from vllm_ext import metrics

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.vllm_ext")

_OURS = "attn_backends.adapter.worker"  # by path: that module imports the platform that asks here
WORKERS = {  # vLLM's, ours where no method serves, and where one does
    "cpu": (
        "vllm.v1.worker.cpu_worker.CPUWorker",
        f"{_OURS}.MendedCPUWorker",
        f"{_OURS}.ExtCPUWorker",
    ),
    "cuda": (
        "vllm.v1.worker.gpu_worker.Worker",
        "vllm.v1.worker.gpu_worker.Worker",
        f"{_OURS}.ExtGPUWorker",
    ),
}
_SCHEDULER = "kvcache.adapter.scheduler.Routing{}Scheduler"
RUST_FRONTEND_ENV = "VLLM_USE_RUST_FRONTEND"
_active: dict[str, Any] = {}  # what this front-end process serves, for checks of requests

CPU_BLOCK_TOKENS = 32  # selection is by block: small blocks keep what is read close to the budget


def prepare_config(vllm_config: VllmConfig, device_type: str) -> None:
    """Validates our settings against the complete engine configuration.

    Raises:
        ConfigError: bad settings, or (strict) a combination that no method serves.
    """
    method = chosen_method(vllm_config)
    _active.clear()
    if method is None:
        _active["method"] = None
        _choose_worker(vllm_config, device_type, is_served=False)
        return
    metrics.create_folder()
    metrics.export()
    config = method_config(vllm_config, method)
    cache = vllm_config.cache_config
    if device_type == "cpu" and not cache.user_specified_block_size:
        cache.block_size = CPU_BLOCK_TOKENS
    reasons = _all_reasons(vllm_config, device_type)
    if reasons and config.strict:
        raise refuse(method, reasons)
    if reasons:
        logger.warning(
            "%s cannot serve this set-up (%s) and strict is off: EVERY ROW IS SERVED DENSE "
            "by stock vLLM",
            method.name,
            "; ".join(reasons),
        )
    config.check(engine_facts(vllm_config, device_type))
    schedule = None
    if vllm_config.model_config is not None and not reasons:
        # Asked for here already: a bad profile or policy must not wait for workers.
        schedule = method.schedule(config, geometry_of(vllm_config))
        _check_entries(method, vllm_config, device_type)
        if schedule.routed_groups:
            _choose_scheduler(method, vllm_config)
        if config.draft_tokens:
            _check_drafts(method, vllm_config, config.draft_tokens)
    _choose_worker(vllm_config, device_type, is_served=not reasons)
    _active.update(method=method, config=config, is_served=not reasons, schedule=schedule)
    _active["has_prefix_cache"] = bool(cache.enable_prefix_caching)


def _all_reasons(vllm_config: VllmConfig, device_type: str) -> list[str]:
    """What no method can serve: asked at start and, where layers are made, in every process."""
    method = chosen_method(vllm_config)
    draft_tokens = method_config(vllm_config, method).draft_tokens if method else 0
    reasons = unsupported_reasons(vllm_config, device_type, draft_tokens)
    if not reasons:
        reasons += unserved_reasons(vllm_config, device_type)
    if os.environ.get(RUST_FRONTEND_ENV, "0") not in ("", "0"):
        reasons.append(f"{RUST_FRONTEND_ENV} (that front end does not check vllm_xargs)")
    worker_cls = vllm_config.parallel_config.worker_cls
    if worker_cls not in WORKERS[device_type]:
        reasons.append(f"--worker-cls {worker_cls} (ours frees KV blocks and reads options)")
    return reasons


def _choose_worker(vllm_config: VllmConfig, device_type: str, is_served: bool) -> None:
    """Ours instead of vLLM's; a worker of the user's own stays."""
    parallel = vllm_config.parallel_config
    if parallel.worker_cls in WORKERS[device_type]:
        parallel.worker_cls = WORKERS[device_type][2 if is_served else 1]


def _choose_scheduler(method: SparseMethod, vllm_config: VllmConfig) -> None:
    """One that learns of routes; the builtin platform has decided about async scheduling by now.

    Raises:
        ConfigError: the user chose another one.
    """
    scheduler = vllm_config.scheduler_config
    ours = _SCHEDULER.format("Async" if scheduler.async_scheduling else "Sync")
    if scheduler.scheduler_cls not in (None, ours):
        raise ConfigError(
            f"{method.name} frees by requests' routes, of which --scheduler-cls "
            f"{scheduler.scheduler_cls} would not learn; drop it, or use a profile without "
            "routed_groups"
        )
    scheduler.scheduler_cls = ours


def _check_entries(method: SparseMethod, vllm_config: VllmConfig, device_type: str) -> None:
    """Refuses KV entries that vLLM, or this release, would not keep apart.

    Raises:
        ConfigError: names the flag, or what the method would have to do.
    """
    entries, schedule, geometry = planned_entries(method, vllm_config)
    try:
        check_entries(entries, geometry.num_layers, geometry.num_kv_heads, schedule.dropped)
    except ValueError as error:
        raise ConfigError(f"{method.name}: {error}") from None
    kinds = {entry.policy for entry in entries}
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager and len(kinds) > 1:
        raise ConfigError(
            f"{method.name} keeps different KV blocks in different layers or heads, which "
            "--disable-hybrid-kv-cache-manager rules out; drop that flag"
        )
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    if schedule.prompts_see_everything and num_ranks > 1:
        raise ConfigError(
            f"{method.name} has not been tested with --tensor-parallel-size {num_ranks}; use 1"
        )
    if all(entry.heads is None for entry in entries):
        return
    if choosing := schedule.of_role(*CHOOSING_ROLES):
        raise ConfigError(
            f"{method.name} chooses blocks in layers {list(choosing)}, which cannot be combined "
            "with heads that keep different blocks; give each layer one retention"
        )
    if device_type == "cuda" and not vllm_config.model_config.enforce_eager:
        logger.warning(
            "%s keeps different KV blocks in different heads of a layer, which has not been run on "
            "a GPU under CUDA graphs yet; with --enforce-eager it has",
            method.name,
        )
    if num_ranks > 1:
        raise ConfigError(
            f"{method.name} keeps different KV blocks in different heads of a layer, which is not "
            f"supported with --tensor-parallel-size {num_ranks}; use 1, or a profile by layers"
        )


def _check_drafts(method: SparseMethod, vllm_config: VllmConfig, num_tokens: int) -> None:
    """Refuses what no dense pass could verify, and says what drafts are good for.

    Raises:
        ConfigError: names the layers.
    """
    entries, schedule, _ = planned_entries(method, vllm_config)
    try:
        check_drafting(schedule, entries)
    except ValueError as error:
        raise ConfigError(f"{method.name}: {error}") from None
    logger.info(
        "%s drafts %d tokens a step, one dense pass verifies them: answers are stock vLLM's. That "
        "is slower than stock vLLM with short contexts and with few of them at once "
        "(docs/tuning.md, Lossless)",
        method.name,
        num_tokens,
    )


def _refuse_unserved(extra_args: Mapping[str, Any] | None) -> None:
    from vllm.exceptions import VLLMValidationError

    asked = [key for key in KEYS if key in (extra_args or {})]
    if asked:
        raise VLLMValidationError(
            f"vllm_xargs has {', '.join(asked)}, but this front end does not know which method of "
            "vllm-ext serves: the configuration was made in another process; drop them",
            parameter="vllm_xargs",
        )


def check_request(extra_args: Mapping[str, Any] | None) -> None:
    """Refuses per-request options that would not be honoured.

    Raises:
        VLLMValidationError: names the option, its value and what would work; a 400.
    """
    from vllm.exceptions import VLLMValidationError

    if not _active:
        _refuse_unserved(extra_args)
    if _active.get("method") is None:
        return
    config = _active["config"]
    try:
        options = parse_options(
            extra_args, _active["method"], config.least_budget_tokens, config.presets
        )
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
    if options is None:
        return
    if not _active["is_served"]:
        raise VLLMValidationError("vllm_xargs: this server runs dense, options are void")
    schedule = _active["schedule"]
    if options.is_dense and schedule is not None and schedule.prompts_see_everything:
        # The KV manager learns of the option from the prefix cache's calls alone.
        if not _active["has_prefix_cache"]:
            raise VLLMValidationError(
                "vllm_xargs.sparse is 'off', but this server has no prefix cache, without which "
                "vLLM does not tell which requests free nothing; start it without "
                "--no-enable-prefix-caching, or drop the option"
            )
    elif options.is_dense and schedule is not None and schedule.spans:
        raise VLLMValidationError(
            "vllm_xargs.sparse is 'off', but this server's policy has window layers, and what is "
            "in its prefix cache was computed through them; use 'accurate' or budget_tokens"
        )
    if options.is_dense and schedule is not None and schedule.dropped:
        raise VLLMValidationError(
            "vllm_xargs.sparse is 'off', but this server's profile drops layers "
            f"{list(schedule.dropped)} for every request: their keys do not exist. Ask for "
            "budget_tokens instead, or serve with a profile without drop_layers"
        )


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
    reasons = _all_reasons(vllm_config, current_platform.device_type)
    ours: Any = getattr(backend, name)
    reasons += ours.validate_configuration(
        device_capability=current_platform.get_device_capability(), **selector_config._asdict()
    )
    if not reasons:
        return backend.class_path(name)
    if method_config(vllm_config, method).strict:
        raise refuse(method, reasons)
    return fallback.counted_dense(builtin(), name)
