"""``anchor_decode``: output and block masses against dense fp64 attention, and invariances."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from attn_backends.ops import triton_support
from attn_backends.ops.anchor_decode.api import implementations
from attn_backends.ops.dispatch import OpImpl
from kvcache.layout import KVOrder
from tests.ops.builders import (
    Problem,
    cases_and_orders,
    dense_attention,
    device_of,
    launched_grids,
    make_problem,
    single_row,
    sizes,
    skip_unless_supported,
)
from tests.tolerances import assert_bitwise_equal, assert_no_worse_than_eager

IMPLS = [pytest.param(impl, id=impl.name) for impl in implementations()]
FAST_IMPLS = [impl for impl in IMPLS if impl.id != "reference"]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]

UGLY_SEQ_LENS = (1, 31, 32, 33, 63, 127, 300)
LONG_SEQ_LENS = (700, 1, 257, 64)  # several splits beside a row below any threshold
EXP_ULPS = 20  # of the least exact exponential in use, ATen's exp_u20
SPARE_BLOCKS = 3  # the mass buffer is wider than the block table
CASES = [
    pytest.param({"seq_lens": UGLY_SEQ_LENS}, id="ugly_lengths-gqa2-fp32"),
    pytest.param({"seq_lens": UGLY_SEQ_LENS, "dtype": torch.bfloat16}, id="ugly_lengths-gqa2-bf16"),
    pytest.param(
        {
            "seq_lens": LONG_SEQ_LENS,
            "num_q_heads": 8,
            "num_kv_heads": 1,
            "head_size": 128,
            "dtype": torch.bfloat16,
        },
        id="long_and_short-gqa8-size128-bf16",
    ),
    pytest.param(
        {
            "seq_lens": (300, 127, 1),
            "num_q_heads": 3,
            "num_kv_heads": 1,
            "head_size": 80,
            "block_size": 128,
            "dtype": torch.float16,
        },
        id="gqa3-size80-block128-fp16",
    ),
    pytest.param(
        {
            "seq_lens": (63, 330),
            "num_q_heads": 8,
            "num_kv_heads": 2,
            "head_size": 80,
            "block_size": 64,
        },
        id="gqa4-size80-block64-fp32",
    ),
    pytest.param(
        {
            "seq_lens": (48, 145),
            "num_q_heads": 4,
            "num_kv_heads": 4,
            "head_size": 128,
            "block_size": 48,
        },
        id="gqa1-size128-block48-fp32",
    ),
]


def _decode_problem(impl: OpImpl, order: KVOrder | None = None, **case: Any) -> Problem:
    """One query token per row; without ``order``, the one that suits the implementation."""
    if order is None:
        order = KVOrder.KEY_TRANSPOSED if impl.name == "cpu" else KVOrder.FUSED
    query_lens = [1] * len(case["seq_lens"])
    return make_problem(**case, query_lens=query_lens, order=order, device=device_of(impl))


def _mass_buffer(problem: Problem) -> torch.Tensor:
    """NaN, so that an entry left out is noticed."""
    num_reqs, max_blocks = problem.batch.block_table.shape
    shape = (num_reqs, problem.layout.num_kv_heads, max_blocks + SPARE_BLOCKS)
    return torch.full(shape, torch.nan, device=problem.device)


def _run(impl: OpImpl, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and masses of one implementation, on the CPU."""
    out, mass = problem.out.clone(), _mass_buffer(problem)
    _run_into(impl, problem, out, mass)
    return out.cpu(), mass.cpu()


def _run_into(
    impl: OpImpl, problem: Problem, out: torch.Tensor | None, mass: torch.Tensor | None
) -> None:
    skip_unless_supported(impl, problem.context(with_rule=False))
    impl.run(
        problem.query,
        problem.key_cache,
        problem.value_cache,
        problem.batch,
        problem.scale,
        out,
        mass,
    )


def _check_out(actual: torch.Tensor, problem: Problem) -> None:
    exact = dense_attention(problem, None, torch.float64)
    eager = dense_attention(problem, None, problem.layout.dtype)
    assert_no_worse_than_eager(actual, exact, eager, problem.layout.dtype)


def _check_mass(actual: torch.Tensor, problem: Problem) -> None:
    """Every block's mass within a worst-case bound; their sum is the group's size.

    To first order a block's share is off, relative to itself, by the errors of the exponents
    of its tokens and of all tokens (hence 2 *): per exponent ``head_size`` roundings of a dot
    product and a few of maxima, logarithms and differences, all of values of at most
    ``largest``; then the exponential's own error, and one rounding per summed token.
    """
    group = problem.query.shape[1] // problem.layout.num_kv_heads
    block_size, head_size = problem.layout.block_size, problem.layout.head_size
    fp32 = torch.finfo(torch.float32)
    assert actual.dtype == torch.float32
    for row, all_keys in enumerate(problem.keys):
        seq_len = len(all_keys)
        block_of_token = torch.arange(seq_len) // block_size
        for head in range(problem.layout.num_kv_heads):
            query = problem.query[row, head * group : (head + 1) * group].cpu().double()
            keys = all_keys[:, head].double()
            weights = (query @ keys.T * problem.scale).softmax(dim=-1).sum(dim=0)
            exact = torch.zeros(actual.shape[2], dtype=torch.float64)
            exact.index_add_(0, block_of_token, weights)
            largest = float((query.abs() @ keys.abs().T).max()) * problem.scale
            exponent_error = (head_size + 8) * (largest + math.log(seq_len))
            relative = 2 * fp32.eps * (exponent_error + EXP_ULPS + seq_len)
            underflow = group * block_size * fp32.tiny  # weights that are no normal fp32
            mass = actual[row, head].double()
            assert ((mass - exact).abs() <= relative * exact + underflow * (exact > 0)).all()
            assert abs(float(mass.sum()) - group) <= relative * group


@cases_and_orders(implementations(), CASES)
def test_equals_dense_attention_and_says_where_the_mass_lies(
    impl: OpImpl,
    case: dict[str, Any],
    order: KVOrder,
) -> None:
    problem = _decode_problem(impl, order, **case)
    out, mass = _run(impl, problem)
    _check_out(out, problem)
    _check_mass(mass, problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_output_is_the_same_without_masses(impl: OpImpl, dtype: torch.dtype) -> None:
    problem = _decode_problem(impl, seq_lens=(280, 33), dtype=dtype)
    without = problem.out.clone()
    _run_into(impl, problem, without, None)
    _check_out(without.cpu(), problem)
    if impl.name != "triton" or device_of(impl) == "cpu":  # on a GPU they are two binaries
        assert_bitwise_equal(without.cpu(), _run(impl, problem)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_masses_are_the_same_without_output(impl: OpImpl, dtype: torch.dtype) -> None:
    problem = _decode_problem(impl, seq_lens=(280, 1, 33), dtype=dtype)
    mass = _mass_buffer(problem)
    _run_into(impl, problem, None, mass)
    _check_mass(mass.cpu(), problem)
    if impl.name != "triton" or device_of(impl) == "cpu":  # on a GPU they are two binaries
        assert_bitwise_equal(mass.cpu(), _run(impl, problem)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(impl: OpImpl, dtype: torch.dtype) -> None:
    problem = _decode_problem(impl, seq_lens=(33, 520, 1), dtype=dtype)
    out, mass = _run(impl, problem)
    for row, keys in enumerate(problem.keys):
        alone = single_row(problem, row)
        # Alone, the row's block table is also narrower than in the batch.
        num_blocks = -(-len(keys) // problem.layout.block_size)
        table = alone.batch.block_table[:, :num_blocks].contiguous()
        alone = replace(alone, batch=replace(alone.batch, block_table=table))
        alone_out, alone_mass = _run(impl, alone)
        assert_bitwise_equal(alone_out[0], out[row])
        assert_bitwise_equal(alone_mass[0, :, :num_blocks], mass[row, :, :num_blocks])


@sizes()
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_serves_all_sizes(impl: OpImpl, case: dict[str, Any]) -> None:
    problem = _decode_problem(impl, seq_lens=(300, 1, 130), **case)
    out, mass = _run(impl, problem)
    _check_out(out, problem)
    _check_mass(mass, problem)


# In 16-bit tiles the row has more of them than there may be splits.
@pytest.mark.parametrize("block_size", [16, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_rows_with_more_tiles_than_splits_hold_at_their_smallest(
    impl: OpImpl, block_size: int
) -> None:
    problem = _decode_problem(
        impl,
        seq_lens=(17001, 40),
        num_q_heads=2,
        num_kv_heads=1,
        block_size=block_size,
        dtype=torch.bfloat16,
    )
    out, mass = _run(impl, problem)
    _check_out(out, problem)
    _check_mass(mass, problem)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_do_not_overflow(impl: OpImpl) -> None:
    # In bf16 and not fp32, see test_sparse_decode.py.
    problem = _decode_problem(impl, seq_lens=(700, 65), dtype=torch.bfloat16)
    loud = replace(problem, query=problem.query * 50)
    out, mass = _run(impl, loud)
    _check_out(out, loud)
    _check_mass(mass, loud)


@pytest.mark.parametrize("impl", IMPLS)
def test_query_and_out_may_be_slices_of_wider_tensors(impl: OpImpl) -> None:
    problem = _decode_problem(impl, seq_lens=(40, 133))
    query, out = (torch.cat([t, t, t], dim=1) for t in (problem.query, problem.out))
    mass = _mass_buffer(problem)
    _run_into(impl, replace(problem, query=query[:, 4:8]), out[:, 4:8], mass)
    assert out[:, :4].isnan().all()
    assert out[:, 8:].isnan().all()
    _check_out(out[:, 4:8].cpu(), problem)
    _check_mass(mass.cpu(), problem)


@pytest.mark.parametrize("longest", [40, 300], ids=["one_split", "splits"])
@pytest.mark.parametrize("impl", IMPLS)
def test_padded_rows_without_tokens_give_zeros(impl: OpImpl, longest: int) -> None:
    # CUDA graphs pad a batch with such rows; on CPU there are none.
    problem = _decode_problem(impl, seq_lens=(longest, 33))
    problem.batch.seq_lens[1] = 0
    out, mass = _run(impl, problem)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(mass[1], torch.zeros_like(mass[1]))
    assert out[0].isfinite().all()
    assert mass[0].isfinite().all()


def test_a_batch_that_would_need_much_workspace_is_served_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    impl = next(impl for impl in implementations() if impl.name == "triton")
    problem = _decode_problem(impl, seq_lens=(300, 33, 1))
    out, mass = _run(impl, problem)
    grids = launched_grids(monkeypatch)
    monkeypatch.setattr(triton_support, "MAX_WORKSPACE_BYTES", 1)  # row by row
    part_out, part_mass = _run(impl, problem)
    assert_bitwise_equal(part_out, out)
    assert_bitwise_equal(part_mass, mass)
    assert {grid[0] for grid in grids} == {1}
    assert len(grids) >= 3


def test_one_program_serves_several_splits_as_several_do(monkeypatch: pytest.MonkeyPatch) -> None:
    impl = next(impl for impl in implementations() if impl.name == "triton")
    problem = _decode_problem(impl, seq_lens=(600, 33, 1))
    out, mass = _run(impl, problem)
    grids = launched_grids(monkeypatch)
    monkeypatch.setattr(triton_support, "MAX_PROGRAMS", 1)
    few_out, few_mass = _run(impl, problem)
    assert grids[0][2] == 1
    assert_bitwise_equal(few_out, out)
    assert_bitwise_equal(few_mass, mass)
