"""Layers whose KV heads keep different blocks: folded, bit for bit what they give unfolded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from attn_backends.batch import PagedBatch, SpanRule
from attn_backends.head_tables import (
    HeadPlaces,
    HeadTables,
    fold_heads,
    fold_keys,
    fold_out,
    fold_prefill,
    fold_prefill_rule,
    fold_query,
    fold_rule,
    fold_selection,
    unfold_prefill,
)
from attn_backends.ops.anchor_decode.api import implementations as anchor_implementations
from attn_backends.ops.cache_write.api import implementations as write_implementations
from attn_backends.ops.dispatch import OpImpl
from attn_backends.ops.paged_attention.api import implementations as paged_implementations
from attn_backends.ops.sparse_decode.api import implementations as sparse_implementations
from kvcache.layout import KVOrder, kv_views
from kvcache.spans import Span
from tests.ops.builders import (
    Problem,
    device_of,
    make_problem,
    make_rule,
    random_selection,
    skip_unless_supported,
    slots_of,
)
from tests.tolerances import assert_bitwise_equal

CPU = torch.device("cpu")
HEADS, GROUP = 3, 3
UGLY_SEQ_LENS = (1, 31, 33, 64, 127, 300)
QUERY_LENS = (1, 31, 0, 17, 1, 40)
DTYPES = (torch.float32, torch.bfloat16)
ELASTIC = Span(3, 11, -5, 24)
RULES = [
    pytest.param(None, id="no_rule", marks=pytest.mark.slow),
    pytest.param(ELASTIC, id="elastic_per_query_head"),
]
# vLLM's pool: heads of one group lie apart, those of different groups never own the same block.
# Layers outermost (stride 1, a region per head of a group), and blocks outermost.
PLACES = {
    "two_groups-layers_outermost": ((0, 1, 0), "layers outermost"),
    "two_groups-blocks_outermost": ((0, 1, 0), "blocks outermost"),
    "own_groups-layers_outermost": ((2, 0, 1), "layers outermost"),
    "one_group-blocks_outermost": ((0, 0, 0), "blocks outermost"),
}


def _cases(implementations: list[OpImpl]) -> pytest.MarkDecorator:
    """Implementations, dtypes, groups and places; Triton's slow interpreter serves one of them."""
    cases = [
        pytest.param(impl, dtype, *place, id=f"{impl.name}-{str(dtype)[6:]}-{name}")
        for impl in implementations
        for dtype in DTYPES
        for name, place in PLACES.items()
        if impl.name != "triton" or (dtype, name) == (torch.float32, next(iter(PLACES)))
    ]
    return pytest.mark.parametrize(("impl", "dtype", "groups", "place"), cases)


@dataclass(frozen=True)
class Folded:
    """A problem's content in a pool of tiles, under a table per KV group."""

    heads: HeadTables
    tables: list[torch.Tensor]  # one per KV group
    places: HeadPlaces
    pool: torch.Tensor  # [num_tiles, 1, block_size, 2 * head_size]
    order: KVOrder

    @property
    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values."""
        return kv_views(self.pool, self.order)

    def decode(self, batch: PagedBatch) -> PagedBatch:
        """The batch folded."""
        return self.places.batch(self.heads.decode_rows(batch, self.tables))


def _problem(impl: OpImpl, dtype: torch.dtype, query_lens: tuple[int, ...]) -> Problem:
    order = KVOrder.KEY_TRANSPOSED if impl.name == "cpu" else KVOrder.FUSED
    problem = make_problem(
        UGLY_SEQ_LENS,
        query_lens,
        HEADS * GROUP,
        HEADS,
        dtype=dtype,
        order=order,
        device=device_of(impl),
    )
    skip_unless_supported(impl, problem.context(with_rule=True))
    return problem


def _decode_problem(impl: OpImpl, dtype: torch.dtype) -> Problem:
    return _problem(impl, dtype, (1,) * len(UGLY_SEQ_LENS))


def _fold(problem: Problem, group_of_head: tuple[int, ...], place: str) -> Folded:
    """Every block of every head in a tile of its own, the rest of the pool NaN."""
    layout, table = problem.layout, problem.batch.block_table
    num_groups = max(group_of_head) + 1
    ids = torch.randperm(num_groups * table.numel(), generator=torch.Generator().manual_seed(1))
    tables = list(ids.to(table).view(num_groups, *table.shape).unbind())
    rank = [group_of_head[:head].count(group) for head, group in enumerate(group_of_head)]
    members = max(rank) + 1
    if place == "layers outermost":
        stride, base = 1, [of_group * len(ids) for of_group in rank]
    else:
        stride, base = members, rank
    num_tiles = members * len(ids)
    shape = (num_tiles, 1, layout.block_size, 2 * layout.head_size)
    pool = torch.full(shape, torch.nan, dtype=layout.dtype, device=problem.device)
    key_cache, value_cache = kv_views(pool, layout.order)
    for row, keys in enumerate(problem.keys):
        num_blocks = -(-len(keys) // layout.block_size)
        for head, group in enumerate(group_of_head):
            tiles = base[head] + stride * tables[group][row, :num_blocks].long()
            blocks = table[row, :num_blocks].long()
            key_cache[tiles, 0] = problem.key_cache[blocks, head]
            value_cache[tiles, 0] = problem.value_cache[blocks, head]
        for group, padding in enumerate(tables):
            padding[row, num_blocks:] = -1 if group else 0
    heads = HeadTables.of(
        HEADS,
        num_groups,
        layout.block_size,
        stride,
        max_num_reqs=len(problem.keys) + 2,
        max_num_tokens=sum(UGLY_SEQ_LENS) + 2,
        max_blocks=table.shape[1] + 3,
        device=problem.device,
    )
    places = HeadPlaces(group_of_head, base, layout.block_size, problem.device)
    return Folded(heads, tables, places, pool, layout.order)


def _rule(problem: Problem, span: Span | None) -> SpanRule | None:
    return None if span is None else make_rule(problem, span, per_query_head=True)


@pytest.mark.parametrize("span", RULES)
@_cases(sparse_implementations())
def test_sparse_decode(
    impl: OpImpl, dtype: torch.dtype, groups: tuple[int, ...], place: str, span: Span | None
) -> None:
    problem = _decode_problem(impl, dtype)
    rule, selection = _rule(problem, span), random_selection(problem)
    expected, out = problem.out.clone(), problem.out.clone()
    query, scale = problem.query, problem.scale
    caches = (problem.key_cache, problem.value_cache)
    impl.run(query, *caches, problem.batch, selection, rule, scale, expected)
    folded = _fold(problem, groups, place)
    impl.run(
        fold_query(query, HEADS),
        *folded.views,
        folded.decode(problem.batch),
        fold_selection(selection),
        fold_rule(rule),
        scale,
        fold_out(out, HEADS),
    )
    assert_bitwise_equal(out, expected)


@_cases(anchor_implementations())
def test_anchor_decode_and_its_masses(
    impl: OpImpl, dtype: torch.dtype, groups: tuple[int, ...], place: str
) -> None:
    problem = _decode_problem(impl, dtype)
    shape = (len(problem.keys), HEADS, problem.batch.block_table.shape[1] + 2)
    expected_mass = torch.full(shape, torch.nan, device=problem.device)
    expected, out, mass = problem.out.clone(), problem.out.clone(), expected_mass.clone()
    caches = (problem.key_cache, problem.value_cache)
    impl.run(problem.query, *caches, problem.batch, problem.scale, expected, expected_mass)
    folded = _fold(problem, groups, place)
    # As the engine gives it: part of a wider tensor of queries, keys and values.
    wide = torch.cat([problem.query, problem.query], dim=1)[:, : HEADS * GROUP]
    impl.run(
        fold_query(wide, HEADS),
        *folded.views,
        folded.decode(problem.batch),
        problem.scale,
        fold_out(out, HEADS),
        fold_heads(mass),
    )
    assert_bitwise_equal(out, expected)
    assert_bitwise_equal(mass, expected_mass)


@pytest.mark.parametrize("span", RULES)
@_cases(paged_implementations())
def test_prefill_chunks_beside_decode_rows(
    impl: OpImpl, dtype: torch.dtype, groups: tuple[int, ...], place: str, span: Span | None
) -> None:
    problem = _problem(impl, dtype, QUERY_LENS)
    rule, scale = _rule(problem, span), problem.scale
    expected, out = problem.out.clone(), problem.out.clone()
    caches = (problem.key_cache, problem.value_cache)
    impl.run(problem.query, *caches, problem.batch, rule, scale, expected)
    folded = _fold(problem, groups, place)
    batch = folded.places.batch(folded.heads.prefill_rows(problem.batch, folded.tables))
    query = fold_prefill(problem.query, HEADS)
    folded_out = torch.full_like(query, torch.nan)
    impl.run(query, *folded.views, batch, fold_prefill_rule(rule), scale, folded_out)
    unfold_prefill(folded_out, out)
    assert_bitwise_equal(out, expected)


@_cases(write_implementations())
def test_cache_write(impl: OpImpl, dtype: torch.dtype, groups: tuple[int, ...], place: str) -> None:
    problem = _decode_problem(impl, dtype)
    folded = _fold(problem, groups, place)
    written = replace(folded, pool=torch.full_like(folded.pool, torch.nan))
    block_size = problem.layout.block_size
    mappings = []
    for table in folded.tables:
        rows = zip(table, problem.keys, strict=True)
        slots = [slots_of(blocks, len(keys), block_size) for blocks, keys in rows]
        mappings.append(torch.cat([*slots, torch.tensor([-1, -1])]).to(problem.device))
    padded = [
        torch.cat([*raw, raw[0].new_full((2, *raw[0].shape[1:]), torch.nan)])
        for raw in (problem.keys, problem.values)
    ]
    keys, values = (fold_keys(raw.to(problem.device)) for raw in padded)
    impl.run(keys, values, *written.views, folded.places.slots(folded.heads.write_slots(mappings)))
    assert_bitwise_equal(written.pool, folded.pool)


def test_rows_of_one_step_are_folded_apart_and_decode_rows_into_the_same_memory() -> None:
    problem = make_problem((64, 40, 100), (1, 1, 7), HEADS, HEADS)
    folded = _fold(problem, (0, 1, 0), "layers outermost")
    decode, prefill = problem.batch.rows(0, 2, 0, 2), problem.batch.rows(2, 3, 2, 9)
    of_prefill = folded.heads.prefill_rows(prefill, [table[2:] for table in folded.tables])
    first = folded.decode(decode)
    assert first.seq_lens.tolist() == [64] * HEADS + [40] * HEADS
    assert first.query_start_loc.tolist() == list(range(2 * HEADS + 1))
    before = first.block_table.clone()
    batch = folded.places.batch(of_prefill)
    assert batch.seq_lens.tolist() == [100] * HEADS
    assert batch.query_start_loc.tolist() == [0, 7, 14, 21]
    assert (batch.num_reqs, batch.num_tokens) == (HEADS, 7 * HEADS)
    again = folded.decode(decode)
    assert again.block_table.data_ptr() == first.block_table.data_ptr()
    assert again.seq_lens.data_ptr() == first.seq_lens.data_ptr()
    assert torch.equal(again.block_table, before)


def test_layers_share_a_steps_rows_and_place_them_one_after_another() -> None:
    problem = make_problem((64,), (1,), 2, 2)
    tables = [torch.tensor([[5, 7]], dtype=torch.int32), torch.tensor([[2, 1]], dtype=torch.int32)]
    heads = HeadTables.of(2, 2, 32, 3, max_num_reqs=1, max_num_tokens=1, max_blocks=4, device=CPU)
    rows = heads.decode_rows(problem.batch, tables)
    slots = heads.write_slots([torch.tensor([7 * 32 + 9]), torch.tensor([1 * 32 + 9])])
    for groups, bases in (((0, 1), (0, 2)), ((1, 1), (0, 1))):
        places = HeadPlaces(groups, bases, 32, CPU)
        expected = [
            [base + 3 * block for block in tables[group][0].tolist()]
            for group, base in zip(groups, bases, strict=True)
        ]
        assert places.batch(rows).block_table.tolist() == expected
        assert places.slots(slots).tolist() == [32 * tiles[1] + 9 for tiles in expected]


def test_only_the_columns_of_the_longest_row_are_made_and_padding_stays_in_the_pool() -> None:
    problem = make_problem((64, 300), (1, 1), HEADS, HEADS)
    folded = _fold(problem, (0, 1, 1), "blocks outermost")  # the second group pads with -1
    batch = folded.decode(problem.batch)
    assert batch.block_table.shape == (2 * HEADS, 10)
    assert int(batch.block_table.min()) >= 0
    assert int(batch.block_table.max()) < len(folded.pool)
    short = folded.decode(replace(problem.batch.rows(0, 1, 0, 1), max_seq_len=64))
    assert short.block_table.shape == (HEADS, 2)


def test_every_head_needs_a_base() -> None:
    with pytest.raises(ValueError, match="group_of_head has 3 entries, tile_base 2"):
        HeadPlaces((0, 1, 0), (0, 1), 32, CPU)
