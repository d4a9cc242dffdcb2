"""``block_topk``: exact agreement of all implementations, and what is done with the result."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from attn_backends.batch import BlockSelection
from attn_backends.ops.anchor_decode.api import implementations as anchor_implementations
from attn_backends.ops.block_topk.api import implementations
from attn_backends.ops.dispatch import OpContext, OpImpl
from attn_backends.ops.sparse_decode.api import implementations as sparse_implementations
from kvcache.layout import KVOrder, PagedKVLayout
from tests.ops.builders import (
    dense_attention,
    device_of,
    make_problem,
    poison_hidden,
    skip_unless_supported,
)
from tests.tolerances import assert_bitwise_equal, assert_no_worse_than_eager

BY_NAME = {impl.name: impl for impl in implementations()}
IMPLS = [pytest.param(impl, id=impl.name) for impl in implementations()]
FAST_IMPLS = [impl for impl in IMPLS if impl.id != "reference"]
LAYOUT = PagedKVLayout(4, 32, 2, 64, torch.float32, KVOrder.KEY_TRANSPOSED)
SPARE_ENTRIES = 2  # the buffers are wider than the largest selection
GARBAGE = 12345


def _uniform(shape: Sequence[int]) -> torch.Tensor:
    return torch.rand(*shape)


def _many_ties(shape: Sequence[int]) -> torch.Tensor:
    return torch.randint(0, 4, tuple(shape)) / 3


def _neighbours(shape: Sequence[int]) -> torch.Tensor:
    """Masses that differ in their last bits only."""
    return (torch.randint(0, 5, tuple(shape), dtype=torch.int32) + 0x3DCCCCCD).view(torch.float32)


def _extremes(shape: Sequence[int]) -> torch.Tensor:
    values = torch.tensor([0.0, -0.0, 1e-45, 2e-45, 1.2e-38, 1.0, 64.0, 3e38])
    return values[torch.randint(0, len(values), tuple(shape))]


MASSES = [_uniform, _many_ties, _neighbours, _extremes, torch.zeros]


def _select(
    impl: OpImpl,
    mass: torch.Tensor,
    seq_lens: Sequence[int],
    budgets: Sequence[int],
    sink: int,
    recent: int,
    block_size: int = 32,
) -> BlockSelection:
    """One implementation's selection, on the CPU."""
    device = device_of(impl)
    skip_unless_supported(impl, OpContext(LAYOUT, 4, device, False))
    largest = max(
        min(-(-seq_len // block_size), max(budget, 1))
        for seq_len, budget in zip(seq_lens, budgets, strict=True)
    )
    shape = (*mass.shape[:2], largest + SPARE_ENTRIES)
    out = BlockSelection(
        torch.full(shape, GARBAGE, dtype=torch.int32, device=device),
        torch.full(shape[:2], GARBAGE, dtype=torch.int32, device=device),
    )
    lens, limits = (torch.tensor(n, dtype=torch.int32, device=device) for n in (seq_lens, budgets))
    impl.run(mass.to(device), lens, block_size, limits, sink, recent, out)
    return BlockSelection(out.logical_blocks.cpu(), out.counts.cpu())


def assert_equals_reference(impl: OpImpl, *args: Any) -> None:
    actual, expected = _select(impl, *args), _select(BY_NAME["reference"], *args)
    assert torch.equal(actual.counts, expected.counts)
    assert torch.equal(actual.logical_blocks, expected.logical_blocks)


@pytest.mark.parametrize(
    ("budget", "sink", "recent", "expected"),
    [
        pytest.param(0, 2, 2, [7], id="budget0_is_the_last_block"),
        pytest.param(1, 2, 2, [7], id="last_block_first"),
        pytest.param(2, 2, 2, [6, 7], id="then_recent_blocks"),
        pytest.param(2, 2, 4, [6, 7], id="recent_blocks_from_the_end"),
        pytest.param(3, 2, 2, [0, 6, 7], id="then_sinks_from_the_start"),
        pytest.param(4, 2, 2, [0, 1, 6, 7], id="forced_blocks_only"),
        pytest.param(5, 2, 2, [0, 1, 5, 6, 7], id="then_mass-later_on_ties"),
        pytest.param(6, 2, 2, [0, 1, 3, 5, 6, 7], id="then_mass-next_on_ties"),
        pytest.param(3, 0, 0, [1, 5, 7], id="last_block_is_forced_always"),
        pytest.param(3, 6, 5, [5, 6, 7], id="overlap-recent_first"),
        pytest.param(6, 6, 5, [0, 3, 4, 5, 6, 7], id="overlap-then_sinks"),
        pytest.param(2, 9, 9, [6, 7], id="more_forced_than_blocks"),
        pytest.param(20, 1, 1, list(range(8)), id="budget_for_all"),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_order_of_preference(
    impl: OpImpl, budget: int, sink: int, recent: int, expected: list[int]
) -> None:
    mass = torch.tensor([0.1, 0.9, 0.4, 0.5, 0.0, 0.5, 0.2, 0.0]).view(1, 1, 8)
    selection = _select(impl, mass, [8 * 32 - 31], [budget], sink, recent)
    assert selection.counts.item() == len(expected)
    padded = expected + [-1] * SPARE_ENTRIES
    assert selection.logical_blocks.flatten().tolist() == padded


@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (4, 2), (30, 25)])
@pytest.mark.parametrize("masses", MASSES, ids=lambda masses: masses.__name__.strip("_"))
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_equals_the_reference_with_other_budgets_in_every_row(
    impl: OpImpl, masses: Any, sink: int, recent: int
) -> None:
    blocks = [1, 7, 40, 40, 40, 40]
    budgets = [3, 5, 0, 3, 17, 41]  # of 40 blocks: none, fewer than forced, some, all
    seq_lens = [32 * n - 5 * i for i, n in enumerate(blocks)]
    mass = masses((len(blocks), 2, 43))
    assert_equals_reference(impl, mass, seq_lens, budgets, sink, recent)


# Up to 8,192 blocks a row stays in registers.
@pytest.mark.parametrize("num_blocks", [1025, 8192, 8193])
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_long_rows_equal_the_reference(impl: OpImpl, num_blocks: int) -> None:
    mass = torch.cat([_uniform((1, 1, num_blocks)), _many_ties((1, 1, num_blocks))], dim=1)
    assert_equals_reference(impl, mass, [num_blocks * 16], [num_blocks // 3], 2, 3, 16)


@pytest.mark.parametrize("masses", MASSES, ids=lambda masses: masses.__name__.strip("_"))
def test_triton_reads_rows_that_do_not_fit_into_registers(
    monkeypatch: pytest.MonkeyPatch, masses: Any
) -> None:
    module = importlib.import_module("attn_backends.ops.block_topk.impl.triton")
    monkeypatch.setattr(module, "MAX_TILE", 16)
    seq_lens = [16 * 43 - 3, 16 * 32, 5]
    budgets = [17, 20, 4]
    mass = masses((len(seq_lens), 2, 43))
    assert_equals_reference(BY_NAME["triton"], mass, seq_lens, budgets, 4, 2, 16)


@pytest.mark.parametrize("impl", IMPLS)
def test_buffers_may_be_parts_of_larger_ones(impl: OpImpl) -> None:
    device = device_of(impl)
    skip_unless_supported(impl, OpContext(LAYOUT, 4, device, False))
    blocks = torch.full((3, 2, 9), GARBAGE, dtype=torch.int32, device=device)
    counts = torch.full((3, 2), GARBAGE, dtype=torch.int32, device=device)
    mass = _many_ties((2, 2, 6)).to(device)
    lens, budgets = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([190, 60], [4, 4]))
    impl.run(mass, lens, 32, budgets, 1, 1, BlockSelection(blocks[:2, :, :5], counts[:2]))
    expected = _select(BY_NAME["reference"], mass.cpu(), [190, 60], [4, 4], 1, 1)
    assert torch.equal(blocks[:2, :, :5].cpu(), expected.logical_blocks[:, :, :5])
    assert torch.equal(counts[:2].cpu(), expected.counts)
    assert (blocks[2] == GARBAGE).all()
    assert (blocks[:, :, 5:] == GARBAGE).all()
    assert (counts[2] == GARBAGE).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_rows_without_tokens_select_nothing(impl: OpImpl) -> None:
    # CUDA graphs pad a batch with such rows; on CPU there are none.
    selection = _select(impl, _uniform((2, 2, 4)), [0, 100], [2, 2], 1, 1)
    assert selection.counts.tolist() == [[0, 0], [2, 2]]
    assert (selection.logical_blocks[0] == -1).all()


@pytest.mark.parametrize("budget", [3, 1000], ids=["sparse", "budget_for_all"])
@pytest.mark.parametrize("impl", IMPLS)
def test_sparse_decode_over_the_selection(impl: OpImpl, budget: int) -> None:
    anchor = {impl.name: impl for impl in anchor_implementations()}[impl.name]
    sparse = {impl.name: impl for impl in sparse_implementations()}[impl.name]
    seq_lens = (700, 33, 1, 300)
    order = KVOrder.KEY_TRANSPOSED if impl.name == "cpu" else KVOrder.FUSED
    problem = make_problem(seq_lens, [1] * 4, order=order, device=device_of(impl))
    for one in (impl, anchor, sparse):
        skip_unless_supported(one, problem.context(with_rule=False))
    caches = (problem.key_cache, problem.value_cache, problem.batch)
    mass = torch.empty(4, 2, 24, device=problem.device)
    dense_out, out = problem.out.clone(), problem.out.clone()
    anchor.run(problem.query, *caches, problem.scale, dense_out, mass)
    chosen = _select(impl, mass, seq_lens, [budget] * 4, 1, 1)
    selection = BlockSelection(
        chosen.logical_blocks.to(problem.device), chosen.counts.to(problem.device)
    )
    poison_hidden(problem, None, selection)
    sparse.run(problem.query, *caches, selection, None, problem.scale, out)
    exact = dense_attention(problem, None, torch.float64, selection)
    eager = dense_attention(problem, None, torch.float32, selection)
    assert_no_worse_than_eager(out.cpu(), exact, eager, torch.float32)
    if budget >= max(seq_lens):  # dense attention by another way
        assert_no_worse_than_eager(dense_out.cpu(), exact, eager, torch.float32)
        if impl.name == "cpu":
            assert_bitwise_equal(out, dense_out)
