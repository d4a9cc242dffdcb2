"""Settings of all tests: Triton's interpreter where there is no GPU, fixed seeds, and a core for
each of the processes that test at the same time.
"""

from __future__ import annotations

import os

# Before anything imports triton: its own library is decorated at import. On a GPU machine
# TRITON_INTERPRET=0 runs the real kernels.
os.environ.setdefault("TRITON_INTERPRET", "1")

# `make test` runs two: engines of one would spin on the other's core.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    _cores = sorted(os.sched_getaffinity(0))
    _core = _cores[int(worker.removeprefix("gw")) % len(_cores)]
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": str(_core), "OMP_NUM_THREADS": "1"}

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test must not depend on those that ran before it."""
    torch.manual_seed(0)
