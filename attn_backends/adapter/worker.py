"""vLLM's CPU worker, with the per-request options recorded.

On GPUs per-request options are refused until the V2 runner's row order has been tested there.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from attn_backends.adapter.requests import BOOK

CLASS_PATH = f"{__name__}.ExtCPUWorker"


class ExtCPUWorker(CPUWorker):
    """Tells the request book what arrives and in which order rows run."""

    def init_device(self) -> None:
        """See ``CPUWorker.init_device``."""
        super().init_device()
        runner: Any = self.model_runner
        BOOK.row_ids = lambda: runner.input_batch.req_ids

    def execute_model(self, scheduler_output: Any) -> Any:
        """See ``Worker.execute_model``."""
        BOOK.update(scheduler_output)
        return super().execute_model(scheduler_output)
