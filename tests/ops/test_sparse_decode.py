"""``sparse_decode``: every implementation against dense fp64 attention, and invariances."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attn_backends.batch import BlockSelection, SpanRule
from attn_backends.ops import triton_support
from attn_backends.ops.dispatch import OpImpl
from attn_backends.ops.paged_attention.api import implementations as paged_implementations
from attn_backends.ops.sparse_decode.api import implementations
from kvcache.layout import KVOrder
from kvcache.spans import BETA_UNIT, Span
from tests.ops.builders import (
    Problem,
    cases_and_orders,
    dense_attention,
    device_of,
    full_selection,
    is_interpreted,
    launched_grids,
    make_problem,
    make_rule,
    poison_hidden,
    random_selection,
    single_row,
    sink_window_selection,
    sizes,
    skip_unless_supported,
    visible_tokens,
)
from tests.tolerances import assert_bitwise_equal, assert_no_worse_than_eager

IMPLS = [pytest.param(impl, id=impl.name) for impl in implementations()]
FAST_IMPLS = [impl for impl in IMPLS if impl.id != "reference"]

UGLY_SEQ_LENS = (1, 31, 32, 33, 63, 64, 65, 127)
LONG_SEQ_LENS = (700, 1, 257, 64)  # several splits beside a row below any threshold
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
            "seq_lens": (300, 127),
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
            "seq_lens": (100, 15, 17),
            "num_q_heads": 2,
            "num_kv_heads": 2,
            "head_size": 96,
            "block_size": 16,
            "dtype": torch.bfloat16,
        },
        id="gqa1-size96-block16-bf16",
    ),
    pytest.param(
        {"seq_lens": (48, 145), "num_q_heads": 4, "num_kv_heads": 4, "block_size": 48},
        id="gqa1-size64-block48-fp32",
    ),
]
RULES = [
    pytest.param(None, id="no_rule"),
    pytest.param({"span": Span(0, 40)}, id="sink0-window40", marks=pytest.mark.slow),
    pytest.param(
        {"span": Span(7, 33, -30, 24), "per_query_head": True}, id="elastic_rule_per_query_head"
    ),
]
SELECTIONS = [
    pytest.param(full_selection, id="full"),
    pytest.param(random_selection, id="random"),
]


def _run(
    impl: OpImpl,
    problem: Problem,
    selection: BlockSelection,
    rule: SpanRule | None,
) -> torch.Tensor:
    """Output of one implementation, on the CPU; the problem's own ``out`` stays NaN."""
    skip_unless_supported(impl, problem.context(with_rule=rule is not None))
    out = problem.out.clone()
    impl.run(
        problem.query,
        problem.key_cache,
        problem.value_cache,
        problem.batch,
        selection,
        rule,
        problem.scale,
        out,
    )
    return out.cpu()


def _check(
    actual: torch.Tensor,
    problem: Problem,
    rule: SpanRule | None,
    selection: BlockSelection,
) -> None:
    exact = dense_attention(problem, rule, torch.float64, selection)
    eager = dense_attention(problem, rule, problem.layout.dtype, selection)
    assert_no_worse_than_eager(actual, exact, eager, problem.layout.dtype)


def _decode_problem(impl: OpImpl, order: KVOrder | None = None, **case: Any) -> Problem:
    """One query token per row; without ``order``, the one that suits the implementation."""
    if order is None:
        order = KVOrder.KEY_TRANSPOSED if impl.name == "cpu" else KVOrder.FUSED
    query_lens = [1] * len(case["seq_lens"])
    return make_problem(**case, query_lens=query_lens, order=order, device=device_of(impl))


@pytest.mark.parametrize("rule_args", RULES)
@pytest.mark.parametrize("select", SELECTIONS)
@cases_and_orders(implementations(), CASES)
def test_equals_dense_attention_and_never_reads_hidden_tokens(
    impl: OpImpl,
    case: dict[str, Any],
    order: KVOrder,
    select: Any,
    rule_args: Any,
) -> None:
    problem = _decode_problem(impl, order, **case)
    selection = select(problem)
    rule = None if rule_args is None else make_rule(problem, **rule_args)
    poison_hidden(problem, rule, selection)
    _check(_run(impl, problem, selection, rule), problem, rule, selection)


@pytest.mark.parametrize(
    ("sink_tokens", "window_tokens"),
    [
        pytest.param(0, 32, id="sink0-window_one_block"),
        pytest.param(5, 33, id="sink5-window33"),
        pytest.param(64, 100, id="sink64-window100"),
        pytest.param(40, 1000, id="everything_kept"),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_sink_window_decode_equals_the_last_token_of_ruled_prefill(
    impl: OpImpl,
    sink_tokens: int,
    window_tokens: int,
) -> None:
    problem = _decode_problem(impl, seq_lens=(*UGLY_SEQ_LENS, 300))
    selection, rule = sink_window_selection(problem, sink_tokens, window_tokens)
    poison_hidden(problem, rule)
    for row in range(problem.batch.num_reqs):  # the selection loses no token of the rule
        by_rule = visible_tokens(problem, row, rule)
        assert torch.equal(visible_tokens(problem, row, rule, selection), by_rule)
    decoded = _run(impl, problem, selection, rule)
    paged = {impl.name: impl for impl in paged_implementations()}[impl.name]
    prefilled = problem.out.clone()
    paged.run(
        problem.query,
        problem.key_cache,
        problem.value_cache,
        problem.batch,
        rule,
        problem.scale,
        prefilled,
    )
    exact = dense_attention(problem, rule, torch.float64)
    eager = dense_attention(problem, rule, problem.layout.dtype)
    for actual in (decoded, prefilled.cpu()):
        assert_no_worse_than_eager(actual, exact, eager, problem.layout.dtype)


@pytest.mark.parametrize("alpha_tokens", [-7, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("impl", IMPLS)
def test_elastic_spans_hold_for_every_beta(impl: OpImpl, alpha_tokens: int) -> None:
    # One KV head per beta. One token more or less would change a result by a hundredth or more.
    betas = range(0, BETA_UNIT + 1, 5 if is_interpreted(impl) else 1)
    heads = len(betas)
    problem = _decode_problem(
        impl,
        seq_lens=(100, 47, 2),
        num_q_heads=heads,
        num_kv_heads=heads,
        head_size=16,
        block_size=16,
    )
    spans = [Span(2, 1, alpha_tokens, beta) for beta in betas]
    rule, selection = SpanRule.of(spans, 3, problem.device), full_selection(problem)
    poison_hidden(problem, rule, selection)
    _check(_run(impl, problem, selection, rule), problem, rule, selection)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rule_args", RULES[::2])
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    impl: OpImpl,
    rule_args: Any,
    dtype: torch.dtype,
) -> None:
    problem = _decode_problem(impl, seq_lens=(700, 33, 1, 520, 300), dtype=dtype)
    selection = random_selection(problem)
    rule = None if rule_args is None else make_rule(problem, **rule_args)
    together = _run(impl, problem, selection, rule)
    for row in range(problem.batch.num_reqs):
        counts = selection.counts[row : row + 1]
        # Alone, the row's selection is also narrower than in the batch.
        blocks = selection.logical_blocks[row : row + 1, :, : int(counts.max())]
        row_rule = None if rule is None else rule.rows(row, row + 1)
        alone = _run(impl, single_row(problem, row), BlockSelection(blocks, counts), row_rule)
        assert_bitwise_equal(alone[0], together[row])


@sizes()
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_serves_all_sizes(impl: OpImpl, case: dict[str, Any]) -> None:
    problem = _decode_problem(impl, seq_lens=(300, 1, 130), **case)
    selection, rule = random_selection(problem), make_rule(problem, Span(7, 33, -30, 24), True)
    poison_hidden(problem, rule, selection)
    _check(_run(impl, problem, selection, rule), problem, rule, selection)


@pytest.mark.parametrize("rule_args", RULES[::2])
@pytest.mark.parametrize("impl", IMPLS)
def test_heads_may_read_what_other_heads_selected(impl: OpImpl, rule_args: Any) -> None:
    problem = _decode_problem(impl, seq_lens=(300, 1, 130), num_q_heads=6, num_kv_heads=3)
    selection = random_selection(problem)
    rule = None if rule_args is None else make_rule(problem, **rule_args)
    heads = torch.tensor([2, 0, 2], device=problem.device)
    moved = BlockSelection(selection.logical_blocks[:, heads], selection.counts[:, heads])
    expected = _run(impl, problem, moved, rule)
    _check(expected, problem, rule, moved)
    actual = _run(impl, problem, replace(selection, heads=heads), rule)
    assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_rows_with_more_tiles_than_splits_hold_at_their_smallest(
    impl: OpImpl, block_size: int
) -> None:
    problem = _decode_problem(
        impl,
        seq_lens=(9001, 40),
        num_q_heads=2,
        num_kv_heads=1,
        block_size=block_size,
        dtype=torch.bfloat16,
    )
    selection = full_selection(problem)
    _check(_run(impl, problem, selection, None), problem, None, selection)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_do_not_overflow(impl: OpImpl) -> None:
    # In bf16 and not fp32: with logits in the hundreds an fp32 result is as good as the
    # order in which its dot products were summed, and eager's order is no yardstick.
    problem = _decode_problem(impl, seq_lens=(700, 65), dtype=torch.bfloat16)
    loud = replace(problem, query=problem.query * 50)
    selection = full_selection(problem)
    _check(_run(impl, loud, selection, None), loud, None, selection)


@pytest.mark.parametrize("impl", IMPLS)
def test_query_and_out_may_be_slices_of_wider_tensors(impl: OpImpl) -> None:
    problem = _decode_problem(impl, seq_lens=(40, 133))
    selection = full_selection(problem)
    query, out = (torch.cat([t, t, t], dim=1) for t in (problem.query, problem.out))
    skip_unless_supported(impl, problem.context(with_rule=False))
    impl.run(
        query[:, 4:8],
        problem.key_cache,
        problem.value_cache,
        problem.batch,
        selection,
        None,
        problem.scale,
        out[:, 4:8],
    )
    assert out[:, :4].isnan().all()
    assert out[:, 8:].isnan().all()
    _check(out[:, 4:8].cpu(), problem, None, selection)


@pytest.mark.parametrize("seq_lens", [(64, 33, 1), (600, 97, 64)], ids=["one_split", "splits"])
@pytest.mark.parametrize("impl", IMPLS)
def test_blocks_of_tokens_to_come_are_not_read(impl: OpImpl, seq_lens: tuple[int, ...]) -> None:
    problem = _decode_problem(impl, seq_lens=tuple(n + 96 for n in seq_lens))
    ahead = full_selection(problem)
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=problem.device)
    now = replace(
        problem,
        keys=[keys[:n] for keys, n in zip(problem.keys, seq_lens, strict=True)],
        values=[values[:n] for values, n in zip(problem.values, seq_lens, strict=True)],
        batch=replace(problem.batch, seq_lens=lengths),
    )
    for row, seq_len in enumerate(seq_lens):
        begun = -(-seq_len // problem.layout.block_size)
        to_come = problem.batch.block_table[row, begun : int(ahead.counts[row, 0])].long()
        problem.key_cache[to_come] = problem.value_cache[to_come] = torch.nan
    _check(_run(impl, now, ahead, None), now, None, full_selection(now))


@pytest.mark.parametrize("span", [None, Span(0, 40)], ids=["no_rule", "window40"])
@pytest.mark.parametrize("longest", [40, 300], ids=["one_split", "splits"])
@pytest.mark.parametrize("impl", IMPLS)
def test_padded_rows_without_blocks_give_zeros(
    impl: OpImpl, longest: int, span: Span | None
) -> None:
    # CUDA graphs pad a batch with such rows; on CPU there are none.
    problem = _decode_problem(impl, seq_lens=(longest, 33))
    selection = full_selection(problem)
    problem.batch.seq_lens[1] = 0
    selection.counts[1] = 0
    selection.logical_blocks[1] = -1
    rule = None if span is None else make_rule(problem, span)
    out = _run(impl, problem, selection, rule)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].isfinite().all()


def test_a_batch_that_would_need_much_workspace_is_served_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    impl = next(impl for impl in implementations() if impl.name == "triton")
    problem = _decode_problem(impl, seq_lens=(300, 33, 1, 280))
    selection = replace(
        random_selection(problem), heads=torch.tensor([1, 0], device=problem.device)
    )
    rule = make_rule(problem, Span(7, 33, -30, 24), per_head=True)
    whole = _run(impl, problem, selection, rule)
    grids = launched_grids(monkeypatch)
    monkeypatch.setattr(triton_support, "MAX_WORKSPACE_BYTES", 1)  # row by row
    assert_bitwise_equal(_run(impl, problem, selection, rule), whole)
    assert {grid[0] for grid in grids} == {1}
    assert len(grids) >= 4


def test_one_program_serves_several_splits_as_several_do(monkeypatch: pytest.MonkeyPatch) -> None:
    impl = next(impl for impl in implementations() if impl.name == "triton")
    problem = _decode_problem(impl, seq_lens=(600, 33, 1))
    selection = full_selection(problem)
    whole = _run(impl, problem, selection, None)
    grids = launched_grids(monkeypatch)
    monkeypatch.setattr(triton_support, "MAX_PROGRAMS", 1)
    assert_bitwise_equal(_run(impl, problem, selection, None), whole)
    assert grids[0][2] == 1
