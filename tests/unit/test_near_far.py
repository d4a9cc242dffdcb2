"""Sinks and a window in three launches: each query's keys exactly once."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_backends.batch import PagedBatch, SpanRule
from attn_backends.near_far import NearFar
from kvcache.spans import Span


def _batch(rows: list[tuple[int, int]], device: str = "cpu") -> PagedBatch:
    """Rows of (tokens before the queries, queries)."""
    query_lens = [queries for _, queries in rows]
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor([sum(row) for row in rows], dtype=torch.int32)
    table = torch.arange(3 * len(rows), dtype=torch.int32).view(-1, 3)
    return PagedBatch(
        *(tensor.to(device) for tensor in (starts, seq_lens, table)),
        num_reqs=len(rows),
        num_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(sum(row) for row in rows),
    )


def _seen(num_queries: int, num_keys: int, window: int | None, is_causal: bool) -> torch.Tensor:
    """What a launch shows, ``[num_queries, num_keys]``, aligned at the last query and key."""
    keys = torch.arange(num_keys)
    last = torch.arange(num_queries)[:, None] + num_keys - num_queries
    shown = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if is_causal:
        shown &= keys <= last
    if window is not None:
        shown &= keys > last - window
    return shown


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=4),
    sink=st.integers(1, 9),
    window=st.integers(1, 12),
)
def test_every_query_meets_each_key_it_sees_in_exactly_one_launch(
    rows: list[tuple[int, int]], sink: int, window: int
) -> None:
    batch = _batch(rows)
    cut = NearFar.of(batch, sink, window)
    rule = SpanRule.of([Span(sink, window)], len(rows), torch.device("cpu"))
    bounds = cut.query_start_loc.tolist()
    assert bounds[0::2] == batch.query_start_loc.tolist()
    assert bounds == sorted(bounds)
    assert int(cut.near_keys.max()) <= sink + window  # the bound that the launch is given
    for row, (before, num_queries) in enumerate(rows):
        total = before + num_queries
        met = torch.zeros(num_queries, total, dtype=torch.int64)
        for half in (2 * row, 2 * row + 1):
            assert cut.block_table[half].tolist() == batch.block_table[row].tolist()
            first, last = (bound - bounds[2 * row] for bound in bounds[half : half + 2])
            if first == last:
                continue
            for keys, span, is_causal in (
                (cut.near_keys, None, True),
                (cut.far_keys, window, True),
                (cut.sink_keys, None, False),
            ):
                num_keys = int(keys[half])
                shown = _seen(last - first, num_keys, span, is_causal)
                met[first:last, :num_keys] += shown
        positions = torch.arange(before, total)[:, None]
        tokens = torch.arange(total)
        wanted = rule.sees(row, 0, positions, tokens)[0] & (tokens <= positions)
        assert torch.equal(met, wanted.long())


def test_where_rows_are_cut_never_comes_to_the_host() -> None:
    # A tensor on this device has no values: whatever asks for one raises.
    cut = NearFar.of(_batch([(0, 40), (7, 1)], "meta"), sink_tokens=4, window_tokens=8)
    assert cut.query_start_loc.shape == (5,)
    assert cut.block_table.shape == (4, 3)
