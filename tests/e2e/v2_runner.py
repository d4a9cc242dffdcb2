"""vLLM's V2 model runner on a CPU, as GPUs have it: with asynchronous scheduling, and its Triton
kernels in Triton's interpreter. vLLM's CPU platform has neither, and ours refuses the runner there.
"""

from __future__ import annotations

import types
from typing import Any

ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}


def use_v2_runner(is_async: bool, has_graphs: bool = False) -> None:
    """Makes engines of this process, none of which is there yet, have it.

    Args:
        is_async: whether a step is scheduled before the last one's tokens are known.
        has_graphs: see ``recorded_graphs.py``.
    """
    from triton.backends import backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = types.SimpleNamespace(driver=driver)  # what vLLM looks for before it imports

    _mend_interpreter()

    from vllm.platforms.cpu import CpuPlatform

    from attn_backends.adapter import checks

    refused, update = checks._engine_reasons, CpuPlatform.check_and_update_config

    def reasons(*args: Any) -> list[str]:
        return [reason for reason in refused(*args) if "V2 model runner" not in reason]

    def check_and_update_config(vllm_config: Any) -> None:
        update(vllm_config)
        vllm_config.scheduler_config.async_scheduling = is_async

    checks._engine_reasons = reasons
    CpuPlatform.check_and_update_config = check_and_update_config
    if has_graphs:
        from tests.e2e.recorded_graphs import use_recorded_graphs

        use_recorded_graphs()


def _mend_interpreter() -> None:
    """Some masks of vLLM's sampler are numbers: compiled kernels take them, Triton's interpreter
    takes booleans alone.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def truth(mask: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return mask

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        return load(self, ptrs, truth(mask), *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, ptrs, value, truth(mask), *rest)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store
