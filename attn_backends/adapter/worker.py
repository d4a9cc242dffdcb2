"""vLLM's workers with what no hook of it provides: retention per layer, options per request, whose
rows a batch has, and on GPUs kernels and buffers that are there before the first request.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from attn_backends.adapter.audit import with_audit
from attn_backends.adapter.compat import unseeded_chunks
from attn_backends.adapter.config import chosen_method, engine_facts, method_config
from attn_backends.adapter.dropping import unallocated
from attn_backends.adapter.entries import policies_by_name
from attn_backends.adapter.planning import head_tables_of, selectors_of, take_routes
from attn_backends.adapter.requests import BOOK, RowIds
from attn_backends.adapter.speculation import require_own_drafter
from attn_backends.adapter.warming import unbind_caches, warm_up_builders
from attn_backends.config import ConfigError
from kvcache.adapter.concurrency import Concurrency, concurrency
from kvcache.adapter.news import with_routes
from kvcache.adapter.specs import policies_of, policies_of_groups, with_policies
from kvcache.grouping import check_groups
from kvcache.retention import KeepAll

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

logger = logging.getLogger("vllm.vllm_ext")

LEAST_GAIN = 1.05  # requests at once, to dense's

STOCK_WORKERS = {
    "cpu": "vllm.v1.worker.cpu_worker.CPUWorker",
    "cuda": "vllm.v1.worker.gpu_worker.Worker",
}


def retained_specs(
    vllm_config: VllmConfig, specs: dict[str, KVCacheSpec]
) -> dict[str, KVCacheSpec]:
    """The layers' KV cache specs under the chosen method's retention.

    Args:
        vllm_config: names the method and its settings.
        specs: by layer name, as the model asks for them.

    Raises:
        ConfigError: a layer's cache cannot be retained that way, or settings that do not fit the
            KV block that vLLM chose once the model was loaded.
    """
    method = chosen_method(vllm_config)
    if method is None:
        return specs
    config = method_config(vllm_config, method)
    config.check(engine_facts(vllm_config, current_platform.device_type))
    try:
        return with_policies(
            specs,
            policies_by_name(vllm_config),
            in_flight_tokens=vllm_config.max_in_flight_tokens,
            max_model_len=vllm_config.model_config.max_model_len,
        )
    except TypeError as error:
        raise ConfigError(f"{method.name}: {error}") from None


class RetainingWorker:
    """Put before a worker of vLLM in the bases: retention, and news for the request book."""

    vllm_config: VllmConfig
    model_runner: Any
    _is_warming_up = False

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """See ``Worker.get_kv_cache_spec``; dropped layers have none."""
        stock: Any = super()
        with unallocated(self.vllm_config):
            specs = stock.get_kv_cache_spec()
        planned = retained_specs(self.vllm_config, specs)
        self._planned, self._specs = policies_of(planned), planned
        return planned

    def init_device(self) -> None:
        """See ``Worker.init_device``; the request book is told whose rows a batch has."""
        stock: Any = super()
        stock.init_device()
        BOOK.row_ids = row_ids_of(self.model_runner)
        method = chosen_method(self.vllm_config)
        if method is not None:
            BOOK.presets = method_config(self.vllm_config, method).presets

    def compile_or_warm_up_model(self) -> Any:
        """See ``Worker.compile_or_warm_up_model``: its requests are vLLM's own."""
        self._is_warming_up = True
        try:
            stock: Any = super()
            return stock.compile_or_warm_up_model()
        finally:
            self._is_warming_up = False

    def execute_model(self, scheduler_output: Any) -> Any:
        """See ``Worker.execute_model``."""
        stock: Any = super()
        if self._is_warming_up:
            return stock.execute_model(scheduler_output)
        with BOOK.step(scheduler_output):
            return stock.execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """See ``Worker.sample_tokens``; drafts are made there, and the output carries routes to the
        scheduler.
        """
        stock: Any = super()
        with BOOK.sampling():
            output = stock.sample_tokens(grammar_output)
        routes = {} if output is None else take_routes(self.vllm_config)
        return with_routes(output, routes) if routes else output

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """See ``Worker.initialize_from_config``; dropped layers are bound to another's cache.

        Raises:
            ConfigError: vLLM's KV groups are not the ones that were planned.
        """
        if (method := chosen_method(self.vllm_config)) is not None:
            groups = policies_of_groups(kv_cache_config)
            try:
                check_groups(self._planned, groups)
            except ValueError as error:
                raise ConfigError(f"{method.name}: {error}") from None
            if any(not isinstance(policy, KeepAll) for one in groups for policy in one.values()):
                say_what_is_freed(method.name, concurrency(self.vllm_config, kv_cache_config))
        stock: Any = super()
        with unallocated(self.vllm_config):
            stock.initialize_from_config(kv_cache_config)


def say_what_is_freed(method_name: str, pool: Concurrency) -> None:
    """One line of the log, as ``vllm-ext doctor`` says it; a warning where nothing is gained."""
    if pool.held > LEAST_GAIN * pool.dense or pool.routed_groups:
        logger.info("%s: %s", method_name, pool)
    else:
        logger.warning(
            "%s frees next to nothing: %s; a larger pool, smaller --max-num-batched-tokens or "
            "longer requests would tell",
            method_name,
            pool,
        )


def row_ids_of(runner: Any) -> RowIds:
    """Whose the rows of a runner's batch are.

    Args:
        runner: vLLM's V1 or V2 model runner.
    """
    if not _is_v2(runner):
        return lambda places: _at(places, runner.input_batch.req_ids)
    names: Mapping[int, str] = runner.req_states.index_to_req_id

    def by_place(places: Sequence[int] | None) -> Sequence[str | None]:
        if places is None:
            raise RuntimeError(
                "vLLM's batch does not say whose its rows are: options of requests would be lost"
            )
        return [names[int(place)] for place in places]

    return by_place


def _is_v2(runner: Any) -> bool:
    return hasattr(runner, "req_states")


def _at(places: Sequence[int] | None, ids: Sequence[str]) -> Sequence[str | None]:
    return ids if places is None else [ids[place] for place in places]


class DraftingWorker:
    """Put before ``RetainingWorker``: where rows draft, the served model is the drafter."""

    vllm_config: VllmConfig
    device: torch.device
    model_runner: Any
    _drafts = False

    def init_device(self) -> None:
        """See ``Worker.init_device``."""
        stock: Any = super()
        stock.init_device()
        method = chosen_method(self.vllm_config)
        if method is None or not method_config(self.vllm_config, method).draft_tokens:
            return
        self._drafts = True
        runner = self.model_runner
        if _is_v2(runner):
            from attn_backends.adapter.speculator import SelfSpeculator

            logger.warning(
                "lossless_tokens on vLLM's V2 runner: neither drafts nor what verifies them have "
                "been run on a GPU yet, so that nobody knows whether they pay there"
            )
            runner.speculator = SelfSpeculator(self.vllm_config, self.device)
        else:
            from attn_backends.adapter.compat_sampling import mend_sampling
            from attn_backends.adapter.proposer import SelfProposer

            mend_sampling(runner)
            runner.drafter = SelfProposer(self.vllm_config, self.device, runner)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """See ``Worker.load_model``.

        Raises:
            RuntimeError: vLLM loaded another drafter than ours.
        """
        stock: Any = super()
        stock.load_model(*args, **kwargs)
        if self._drafts:
            runner = self.model_runner
            drafter = runner.speculator if _is_v2(runner) else runner.drafter
            require_own_drafter(drafter, runner.model)


class ReadyBeforeServing:
    """Put before ``RetainingWorker`` on GPUs: what else would come with the first requests."""

    vllm_config: VllmConfig
    device: torch.device
    model_runner: Any
    _specs: dict[str, KVCacheSpec]

    def determine_available_memory(self) -> int:
        """See ``Worker.determine_available_memory``: builders are made after vLLM has measured, so
        their selectors' buffers, and those of heads that are rows, are held meanwhile. Layers let
        go of the small cache on which vLLM captured graphs to measure them.
        """
        engine = self.vllm_config, self._specs, self.device
        held = selectors_of(*engine), head_tables_of(*engine)
        stock: Any = super()
        available_bytes: int = stock.determine_available_memory()
        del held
        unbind_caches(self.vllm_config)
        torch.accelerator.empty_cache()
        return available_bytes

    def compile_or_warm_up_model(self) -> Any:
        """See ``Worker.compile_or_warm_up_model``: our kernels first, before graphs hold them."""
        if chosen_method(self.vllm_config) is not None:
            warm_up_builders(self.model_runner, self.vllm_config)
        stock: Any = super()
        return stock.compile_or_warm_up_model()


_builtin: Any = resolve_obj_by_qualname(STOCK_WORKERS[current_platform.device_type])

if current_platform.is_cpu():

    class MendedCPUWorker(_builtin):  # type: ignore[misc]
        """vLLM's CPU worker without the faults in ``compat.py``, whatever backend serves."""

        def init_device(self) -> None:
            """See ``CPUWorker.init_device``."""
            super().init_device()
            if self.vllm_config.lora_config is not None:
                from attn_backends.adapter.compat_lora import with_adapters

                with_adapters(self.model_runner)

        def sample_tokens(self, grammar_output: Any) -> Any:
            """See ``Worker.sample_tokens``."""
            with unseeded_chunks(self.model_runner):
                return super().sample_tokens(grammar_output)

    class ExtCPUWorker(DraftingWorker, RetainingWorker, MendedCPUWorker):
        """Audits, too."""

        def init_device(self) -> None:
            """See ``CPUWorker.init_device``."""
            super().init_device()
            method = chosen_method(self.vllm_config)
            if method is None:
                return
            config = method_config(self.vllm_config, method)
            if config.audited_share:
                with_audit(self.model_runner, config.audited_share, method.name)

else:

    class ExtGPUWorker(  # type: ignore[misc]
        ReadyBeforeServing, DraftingWorker, RetainingWorker, _builtin
    ):
        """Retention, the request book, own drafts, and all that is ready before serving."""
