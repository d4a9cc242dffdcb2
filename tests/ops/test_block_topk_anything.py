"""``block_topk`` on problems that nobody thought of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")  # a bare GPU machine has none

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.test_block_topk import BY_NAME, assert_equals_reference


@st.composite
def _problems(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[int], int, int, int]:
    block_size = draw(st.sampled_from([16, 32]))
    seq_lens = draw(st.lists(st.integers(1, 400), min_size=1, max_size=4))
    budgets = [draw(st.integers(0, 30)) for _ in seq_lens]
    width = -(-max(seq_lens) // block_size) + draw(st.integers(0, 2))
    level = st.one_of(st.integers(0, 3).map(float), st.floats(0, 64, width=32))
    size = len(seq_lens) * 2 * width
    values = draw(st.lists(level, min_size=size, max_size=size))
    mass = torch.tensor(values).view(len(seq_lens), 2, width)
    sink, recent = draw(st.integers(0, 8)), draw(st.integers(0, 8))
    return mass, seq_lens, budgets, sink, recent, block_size


@settings(max_examples=100, deadline=None)
@given(problem=_problems())
def test_cpu_equals_the_reference_on_any_problem(problem: tuple[Any, ...]) -> None:
    assert_equals_reference(BY_NAME["cpu"], *problem)
