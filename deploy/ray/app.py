"""vllm-ext under Ray Serve: ``import_path: deploy.ray.app:build`` (see ``deploy/ray/``).

Built on ray.serve.llm: its configuration, its engine, its ingress and routers. Added are
what it does not do: refusing to serve without our platform, our metrics on Ray's port, an
API key, and an error for a stream that broke off.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import psutil
from ray import serve
from ray._common.usage.usage_lib import usage_stats_enabled
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.deployment import Application
from ray.serve.llm import LLMServingArgs, build_llm_deployment
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from vllm.v1.engine.exceptions import EngineDeadError

from deploy.ray.ingress import endpoints
from deploy.ray.settings import check_engine_kwargs
from vllm_ext.platforms.selection import prepare_config

logger = logging.getLogger("ray.serve")

SERVING_NICENESS = 10


def give_way() -> None:
    """Lets processes that start a replica on the same cores go first.

    The engines' main threads compute; Ray's own default for its workers is 15, from their start.
    """
    for engine in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.nice(max(engine.nice(), SERVING_NICENESS))


def require_extension() -> None:
    """Refuses to go on without our platform: vLLM only logs a plugin that fails.

    Raises:
        RuntimeError: names the platform found and what switches ours off.
    """
    from vllm.platforms import current_platform

    from vllm_ext.platforms.mixin import ExtPlatformMixin

    if not isinstance(current_platform, ExtPlatformMixin):
        raise RuntimeError(
            f"vllm-ext is not active in this replica (platform {type(current_platform).__name__});"
            " install it on every node, and check VLLM_EXT_DISABLE, VLLM_PLUGINS and "
            "VLLM_TARGET_DEVICE there"
        )


class ExtVLLMEngine(VLLMEngine):
    """ray.serve.llm's engine, which checks per-request options, with fewer processes on a CPU.

    Off the CPU Ray makes the configuration in another process, where our platform checked it;
    requests are checked against it in this one.

    On one CPU rank the model has no process of its own: a process fewer imports vLLM, so that a
    lost replica is back sooner. vLLM insists on the process to set OpenMP's variables before it
    starts; with ``nobind`` it sets none.
    """

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        prepare_config(config, config.device_config.device_type)
        parallel = config.parallel_config
        is_free = os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind"
        if config.device_config.device_type == "cpu" and parallel.world_size == 1 and is_free:
            parallel.distributed_executor_backend = "uni"  # what a GPU gets; Ray insists on "mp"
        return arguments, frontend, config


class ExtLLMServer(LLMServer):
    """A replica: ray.serve.llm's server, never without vllm-ext, with its metrics."""

    _default_engine_cls = ExtVLLMEngine

    async def start(self) -> None:
        """Starts the engine.

        Raises:
            RuntimeError: vllm-ext is not active here; Serve reports the deployment as failed.
        """
        from vllm.platforms import current_platform

        from vllm_ext import metrics, ray_metrics

        require_extension()
        metrics.create_folder()  # the engine's processes inherit its name
        if Path(str(self._llm_config.model_loading_config.model_source)).is_dir():
            # Nothing to download; the task that would see to it takes ten seconds to import vLLM.
            self._llm_config.get_or_create_callback().ctx.run_init_node = False
        await super().start()
        if current_platform.is_cpu():
            give_way()
        ray_metrics.start(serve.get_replica_context().replica_id.unique_id)

    async def _start_engine(self) -> None:
        if usage_stats_enabled():
            await super()._start_engine()
        else:  # the actor that would report usage imports vLLM, too: 0.7 GB for nothing
            await self.engine.start()

    async def check_health(self) -> None:
        """Ends this process when the engine died.

        It cannot come back in here. Until Serve has seen three failed checks it would answer
        every request with an error, and then hold its place for the graceful shutdown.
        """
        try:
            await super().check_health()
        except EngineDeadError:
            logger.critical("the engine died; this replica ends, Serve starts another one")
            logging.shutdown()
            os._exit(1)


def build(args: dict[str, Any]) -> Application:
    """The application, from ``args`` of a Serve config file.

    Args:
        args: those of ``ray.serve.llm:build_openai_app`` (``llm_configs``,
            ``ingress_deployment_config``), and ``require_api_key`` (false).

    Raises:
        UserError: no method of ours.
        ConfigError: a setting that cannot be honoured.
    """
    args = dict(args)
    requires_key = bool(args.pop("require_api_key", False))
    serving = LLMServingArgs.model_validate(args)
    servers, cards = {}, {}
    for config in serving.llm_configs:
        check_engine_kwargs(config.model_id, config.engine_kwargs)
        servers[config.model_id] = build_llm_deployment(config, deployment_cls=ExtLLMServer)
        cards[config.model_id] = to_model_metadata(config.model_id, config)
    options = OpenAiIngress.get_deployment_options(serving.llm_configs)
    options |= serving.ingress_deployment_config
    if "num_replicas" in options:
        options.pop("autoscaling_config", None)  # Serve refuses both
    ingress = make_fastapi_ingress(OpenAiIngress, endpoint_map=endpoints(requires_key))
    return serve.deployment(ingress, **options).bind(llm_deployments=servers, model_cards=cards)
