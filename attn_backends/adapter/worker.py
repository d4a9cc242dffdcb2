"""vLLM's workers with what no hook of it provides: retention per layer, options per request.

Per-request options are recorded on CPU only: on GPUs they are refused until the V2 runner's
row order has been tested there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from attn_backends.adapter.audit import with_audit
from attn_backends.adapter.compat import unseeded_chunks
from attn_backends.adapter.config import chosen_method, engine_facts, method_config
from attn_backends.adapter.dropping import unallocated
from attn_backends.adapter.entries import policies_by_name
from attn_backends.adapter.requests import BOOK
from attn_backends.config import ConfigError
from kvcache.adapter.specs import policies_of, policies_of_groups, with_policies
from kvcache.grouping import check_groups

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

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

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """See ``Worker.get_kv_cache_spec``; dropped layers have none."""
        stock: Any = super()
        with unallocated(self.vllm_config):
            specs = stock.get_kv_cache_spec()
        planned = retained_specs(self.vllm_config, specs)
        self._planned = policies_of(planned)
        return planned

    def execute_model(self, scheduler_output: Any) -> Any:
        """See ``Worker.execute_model``."""
        BOOK.update(scheduler_output)
        stock: Any = super()
        return stock.execute_model(scheduler_output)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """See ``Worker.initialize_from_config``; dropped layers are bound to another's cache.

        Raises:
            ConfigError: vLLM's KV groups are not the ones that were planned.
        """
        if (method := chosen_method(self.vllm_config)) is not None:
            try:
                check_groups(self._planned, policies_of_groups(kv_cache_config))
            except ValueError as error:
                raise ConfigError(f"{method.name}: {error}") from None
        stock: Any = super()
        with unallocated(self.vllm_config):
            stock.initialize_from_config(kv_cache_config)


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

    class ExtCPUWorker(RetainingWorker, MendedCPUWorker):
        """Tells the request book, too, in which order rows run."""

        def init_device(self) -> None:
            """See ``CPUWorker.init_device``."""
            super().init_device()
            runner: Any = self.model_runner
            BOOK.row_ids = lambda: runner.input_batch.req_ids
            method = chosen_method(self.vllm_config)
            if method is None:
                return
            config = method_config(self.vllm_config, method)
            if config.audited_share:
                with_audit(runner, config.audited_share, method.name)
            BOOK.presets = config.presets

else:

    class ExtGPUWorker(RetainingWorker, _builtin):  # type: ignore[misc]
        """Retention."""
