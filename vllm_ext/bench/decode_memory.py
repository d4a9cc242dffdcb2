"""What the engines of ``vllm-ext bench decode`` need on a GPU, and whether all fit at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_ext.bench.decode_workload import Cell, Workload
from vllm_ext.engine_process import kv_token_bytes
from vllm_ext.errors import UserError

# Of one engine beside weights and keys: CUDA's context, activations of a prefill chunk of 16,384
# tokens, graphs, workspaces. An estimate on the safe side.
ENGINE_BYTES = 6 << 30
USABLE_SHARE = 0.97  # of what is free: allocators round up
_SLACK_TOKENS = 256  # of a request: two blocks of 128


def kv_bytes(workload: Workload, cell: Cell) -> int:
    """Bytes of a KV pool that holds a cell: its requests with slack, and the null block."""
    request_tokens = cell.context_tokens + workload.long_tokens + _SLACK_TOKENS
    tokens = request_tokens * cell.batch + _SLACK_TOKENS
    return tokens * kv_token_bytes(workload.model, workload.dtype)


def pool_bytes(workload: Workload) -> int:
    """Bytes of a KV pool that holds every cell, one at a time."""
    return max(kv_bytes(workload, cell) for cell in workload.cells)


def weights_bytes(workload: Workload) -> int:
    """Bytes of the weights on the GPU; files are taken for 16 bit."""
    if workload.random_parameters:
        stored = 2 * workload.random_parameters
    else:
        stored = sum(path.stat().st_size for path in Path(workload.model).glob("*.safetensors"))
    return stored * (2 if workload.dtype == "float32" else 1)


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of a GPU."""

    free_bytes: int
    total_bytes: int

    @classmethod
    def now(cls) -> GpuMemory:
        """Of the current device."""
        return cls(*torch.cuda.mem_get_info())

    def engine_share(self, workload: Workload) -> float:
        """Share of the GPU for one engine: vLLM refuses to start where less than that is free."""
        return min(1.0, _engine_bytes(workload) / self.total_bytes)

    def engines_at_once(self, workload: Workload) -> int:
        """How many engines fit, at least one.

        Raises:
            UserError: not even one; says which cell is too large, and what would fit.
        """
        usable_bytes = int(self.free_bytes * USABLE_SHARE)
        if engines := usable_bytes // _engine_bytes(workload):
            return engines
        cell = max(workload.cells, key=lambda cell: kv_bytes(workload, cell))
        rest_bytes = usable_bytes - weights_bytes(workload) - ENGINE_BYTES
        batch = cell.batch
        while batch and kv_bytes(workload, Cell(batch, cell.context_tokens)) > rest_bytes:
            batch -= 1
        advice = f"at most {batch} such requests fit" if batch else "not one such request fits"
        raise UserError(
            f"{cell} tokens need {_gib(pool_bytes(workload))} of keys and values, beside "
            f"{_gib(weights_bytes(workload))} of weights and {_gib(ENGINE_BYTES)} of workspace; "
            f"{_gib(usable_bytes)} of the GPU are free: {advice} (or fewer --layers)"
        )


def _engine_bytes(workload: Workload) -> int:
    return weights_bytes(workload) + pool_bytes(workload) + ENGINE_BYTES


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
