"""``paged_attention``: every implementation against dense fp64 attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attn_backends.batch import PagedBatch, SpanRule
from attn_backends.ops.dispatch import OpImpl
from attn_backends.ops.paged_attention.api import implementations
from kvcache.layout import KVOrder
from kvcache.spans import BETA_UNIT, Span, everything
from tests.ops.builders import (
    Problem,
    cases_and_orders,
    dense_attention,
    device_of,
    is_interpreted,
    make_problem,
    make_rule,
    poison_hidden,
    sizes,
    skip_unless_supported,
)
from tests.tolerances import assert_bitwise_equal, assert_no_worse_than_eager

IMPLS = [pytest.param(impl, id=impl.name) for impl in implementations()]
FAST_IMPLS = [impl for impl in IMPLS if impl.id != "reference"]

# Prefill, chunked prefill (query shorter than sequence) and decode rows, mixed.
UGLY_SEQ_LENS, UGLY_QUERY_LENS = (1, 31, 32, 33, 63, 64, 65, 127), (1, 31, 5, 33, 1, 17, 65, 40)
CASES = [
    pytest.param(
        {"seq_lens": UGLY_SEQ_LENS, "query_lens": UGLY_QUERY_LENS},
        id="ugly_lengths-gqa2-fp32",
    ),
    pytest.param(
        {"seq_lens": UGLY_SEQ_LENS, "query_lens": UGLY_QUERY_LENS, "dtype": torch.bfloat16},
        id="ugly_lengths-gqa2-bf16",
    ),
    pytest.param(
        {
            "seq_lens": (130, 7, 65),
            "query_lens": (40, 7, 1),
            "num_q_heads": 8,
            "num_kv_heads": 1,
            "head_size": 128,
            "block_size": 64,
            "dtype": torch.bfloat16,
        },
        id="gqa8-size128-block64-bf16",
    ),
    pytest.param(
        {
            "seq_lens": (127, 129),
            "query_lens": (3, 129),
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
            "seq_lens": (70, 15, 16, 17),
            "query_lens": (1, 15, 16, 2),
            "num_q_heads": 2,
            "num_kv_heads": 2,
            "head_size": 96,
            "block_size": 16,
            "dtype": torch.bfloat16,
        },
        id="gqa1-size96-block16-bf16",
    ),
    pytest.param(
        {
            "seq_lens": (100, 48),
            "query_lens": (9, 48),
            "num_q_heads": 8,
            "num_kv_heads": 2,
            "block_size": 48,
        },
        id="gqa4-size64-block48-fp32",
    ),
    pytest.param(
        {
            "seq_lens": (1, 161),
            "query_lens": (1, 1),
            "num_q_heads": 6,
            "num_kv_heads": 2,
            "head_size": 80,
            "block_size": 80,
            "dtype": torch.float16,
        },
        id="decode_only-gqa3-size80-block80-fp16",
    ),
]
RULES = [
    pytest.param(None, id="causal"),
    pytest.param({"span": Span(0, 20)}, id="sink0-window20", marks=pytest.mark.slow),
    pytest.param({"span": Span(5, 33, -40, 48)}, id="sink5-elastic48-alpha_negative"),
    pytest.param({"span": Span(17, 1)}, id="sink17-window1", marks=pytest.mark.slow),
    pytest.param(
        {"span": Span(3, 11, -5, 24), "per_head": True}, id="rule_per_head", marks=pytest.mark.slow
    ),
    pytest.param({"span": Span(3, 11, -5, 24), "per_query_head": True}, id="rule_per_query_head"),
]


def _run(impl: OpImpl, problem: Problem, rule: SpanRule | None) -> torch.Tensor:
    """Output of one implementation, on the CPU; the problem's own ``out`` stays NaN."""
    skip_unless_supported(impl, problem.context(with_rule=rule is not None))
    out = problem.out.clone()
    impl.run(
        problem.query,
        problem.key_cache,
        problem.value_cache,
        problem.batch,
        rule,
        problem.scale,
        out,
    )
    return out.cpu()


def _check(actual: torch.Tensor, problem: Problem, rule: SpanRule | None) -> None:
    exact = dense_attention(problem, rule, torch.float64)
    eager = dense_attention(problem, rule, problem.layout.dtype)
    assert_no_worse_than_eager(actual, exact, eager, problem.layout.dtype)


@pytest.mark.parametrize("rule_args", RULES)
@cases_and_orders(implementations(), CASES)
def test_equals_dense_attention_and_never_reads_hidden_tokens(
    impl: OpImpl,
    case: dict[str, Any],
    order: KVOrder,
    rule_args: dict[str, Any] | None,
) -> None:
    problem = make_problem(**case, order=order, device=device_of(impl))
    rule = None if rule_args is None else make_rule(problem, **rule_args)
    poison_hidden(problem, rule)
    _check(_run(impl, problem, rule), problem, rule)


@sizes()
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_serves_all_sizes(impl: OpImpl, case: dict[str, Any]) -> None:
    problem = _problem(impl, seq_lens=(300, 17), query_lens=(70, 17), **case)
    rule = make_rule(problem, Span(7, 33, -30, 24), per_head=True)
    poison_hidden(problem, rule)
    _check(_run(impl, problem, rule), problem, rule)


@pytest.mark.parametrize("span", [Span(5, 33), Span(0, 200), Span(300, 1)], ids=str)
@pytest.mark.parametrize("block_size", [16, 48, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_sinks_and_a_far_window_are_exact(impl: OpImpl, block_size: int, span: Span) -> None:
    problem = _problem(
        impl,
        seq_lens=(1500,),
        query_lens=(20,),
        num_q_heads=2,
        num_kv_heads=1,
        block_size=block_size,
        dtype=torch.bfloat16,
    )
    rule = make_rule(problem, span)
    poison_hidden(problem, rule)
    _check(_run(impl, problem, rule), problem, rule)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_rule_that_hides_nothing_changes_nothing(impl: OpImpl) -> None:
    problem = _problem(impl, seq_lens=(33, 100), query_lens=(33, 9))
    plain = _run(impl, problem, None)
    for span in (everything(), Span(1 << 20, 1), Span(64, 64), Span(0, 1, beta_64ths=64)):
        assert_bitwise_equal(_run(impl, problem, make_rule(problem, span)), plain)


@pytest.mark.parametrize("impl", IMPLS)
def test_elastic_spans_hold_at_every_position_for_every_beta(impl: OpImpl) -> None:
    # One KV head per beta. One token more or less would change a result by a fiftieth or more.
    betas = range(0, BETA_UNIT + 1, 5 if is_interpreted(impl) else 1)
    problem = _problem(
        impl,
        seq_lens=(50,),
        query_lens=(50,),
        num_q_heads=len(betas),
        num_kv_heads=len(betas),
        head_size=16,
        block_size=16,
    )
    for alpha_tokens in (-7, 3):
        spans = [Span(2, 1, alpha_tokens, beta) for beta in betas]
        rule = SpanRule.of(spans, 1, problem.device)
        _check(_run(impl, problem, rule), problem, rule)


@pytest.mark.parametrize("rule_args", RULES[:3])
@pytest.mark.parametrize("chunk", [7, 32])
@pytest.mark.parametrize("impl", IMPLS)
def test_prefill_in_chunks_equals_prefill_at_once(
    impl: OpImpl,
    chunk: int,
    rule_args: dict[str, Any] | None,
) -> None:
    seq_len = 75
    problem = _problem(impl, seq_lens=(seq_len,), query_lens=(seq_len,))
    rule = None if rule_args is None else make_rule(problem, **rule_args)
    whole = _run(impl, problem, rule)
    chunked = torch.full_like(whole, torch.nan)
    for first in range(0, seq_len, chunk):
        last = min(first + chunk, seq_len)
        chunked[first:last] = _run(impl, _chunk(problem, first, last), rule)
    _check(whole, problem, rule)
    _check(chunked, problem, rule)


def _chunk(problem: Problem, first: int, last: int) -> Problem:
    """Queries ``[first, last)`` of a one-row prefill, as the engine would schedule them."""
    batch = PagedBatch(
        query_start_loc=torch.tensor([0, last - first], dtype=torch.int32, device=problem.device),
        seq_lens=torch.tensor([last], dtype=torch.int32, device=problem.device),
        block_table=problem.batch.block_table,
        num_reqs=1,
        num_tokens=last - first,
        max_query_len=last - first,
        max_seq_len=last,
    )
    return replace(
        problem,
        batch=batch,
        query=problem.query[first:last],
        out=problem.out[first:last],
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_queries_and_padding_tokens_are_left_alone(impl: OpImpl) -> None:
    problem = _problem(impl, seq_lens=(40, 33, 5), query_lens=(3, 0, 5))
    padding = torch.full((2, *problem.query.shape[1:]), torch.nan, device=problem.device)
    padded = replace(
        problem,
        query=torch.cat([problem.query, padding]),
        out=torch.cat([problem.out, padding]),
    )
    out = _run(impl, padded, None)
    assert out[8:].isnan().all()
    _check(out[:8], problem, None)


@pytest.mark.parametrize("impl", IMPLS)
def test_upper_bounds_of_lengths_do_no_harm(impl: OpImpl) -> None:
    problem = _problem(impl, seq_lens=(40, 33), query_lens=(3, 1))
    loose = replace(problem.batch, max_query_len=50, max_seq_len=500)
    out = _run(impl, replace(problem, batch=loose), None)
    _check(out, problem, None)


@pytest.mark.parametrize("impl", IMPLS)
def test_query_and_out_may_be_slices_of_wider_tensors(impl: OpImpl) -> None:
    problem = _problem(impl, seq_lens=(40, 33), query_lens=(3, 33))
    query, out = (torch.cat([t, t, t], dim=1) for t in (problem.query, problem.out))
    skip_unless_supported(impl, problem.context(with_rule=False))
    impl.run(
        query[:, 4:8],
        problem.key_cache,
        problem.value_cache,
        problem.batch,
        None,
        problem.scale,
        out[:, 4:8],
    )
    assert out[:, :4].isnan().all()
    assert out[:, 8:].isnan().all()
    _check(out[:, 4:8].cpu(), problem, None)


def _problem(impl: OpImpl, **case: Any) -> Problem:
    """A problem in the cache order that suits the implementation."""
    order = KVOrder.KEY_TRANSPOSED if impl.name == "cpu" else KVOrder.FUSED
    return make_problem(**case, order=order, device=device_of(impl))
