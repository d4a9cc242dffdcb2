"""Settings of all tests: Triton's interpreter where there is no GPU, and fixed seeds."""

from __future__ import annotations

import os

# Before anything imports triton: its own library is decorated at import. On a GPU machine
# TRITON_INTERPRET=0 runs the real kernels.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test must not depend on those that ran before it."""
    torch.manual_seed(0)
