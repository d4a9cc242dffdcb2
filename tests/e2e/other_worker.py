"""A worker of somebody else's, which our methods cannot rely on."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker


class OtherWorker(CPUWorker):
    """vLLM's, by another name."""
