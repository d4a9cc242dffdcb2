"""A layer's step by itself: what anchors select, keep and check. Nothing of an engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attn_backends.batch import BlockSelection, PagedBatch, RowOptions
from attn_backends.budget import BudgetSelector
from attn_backends.budget_config import BudgetConfig
from attn_backends.head_tables import HeadPlaces
from attn_backends.layer_step import LayerStep, StepBatch
from attn_backends.method import Geometry
from attn_backends.ops.dispatch import OpContext
from attn_backends.ops.resolution import ORDER_OF_DEVICE, resolve_ops
from attn_backends.plan import (
    Anchor,
    Checked,
    Dense,
    KeptRows,
    LayerPlan,
    LayerRole,
    LayerSchedule,
    Reuse,
    reading_everything,
)
from attn_backends.split_step import SplitLayerStep, SplitRows
from kvcache.layout import PagedKVLayout, kv_views
from tests.batches import decode_batch, step_rows

ROWS, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, BLOCKS = 3, 2, 4, 32, 32, 12
ORDER = ORDER_OF_DEVICE["cpu"]
SCALE = HEAD**-0.5
CPU = torch.device("cpu")
IDS = ("a", "b", "c")


def _batch(seq_lens: list[int]) -> PagedBatch:
    table = torch.arange(ROWS * BLOCKS, dtype=torch.int32).view(ROWS, BLOCKS)
    return decode_batch(seq_lens, table)


class _Layer:
    """An anchor layer, its cache and its selector."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        layout = PagedKVLayout(ROWS * BLOCKS, BLOCK, KV_HEADS, HEAD, torch.float32, ORDER)
        self.cache = torch.randn(ROWS * BLOCKS, KV_HEADS, BLOCK, 2 * HEAD, generator=generator)
        self.queries = torch.randn(4, ROWS, QUERY_HEADS, HEAD, generator=generator)
        self.ops = resolve_ops(OpContext(layout, QUERY_HEADS, "cpu", with_rule=False), "reference")
        geometry = Geometry(1, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, ROWS, BLOCKS * BLOCK)
        config = BudgetConfig(
            budget_tokens=128, sink_tokens=32, recent_tokens=32, min_context_tokens=0
        )
        schedule = LayerSchedule((LayerRole.SELF,))
        self.selector = BudgetSelector(config, schedule, geometry, CPU)
        self.store = BlockSelection.empty((ROWS, KV_HEADS, BLOCKS), CPU)

    def step(
        self, number: int, seq_lens: list[int], due: list[int] | None, slots: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and selection of one step; ``due`` None: as without ``reselect_steps``."""
        plan = self.selector.plan(step_rows(seq_lens, request_ids=IDS)).layers[0]
        way = plan.decode
        assert isinstance(way, Anchor)
        if due is not None:
            rows = torch.tensor(due) if due else None
            way = replace(way, kept=KeptRows(rows, torch.tensor(slots), self.store))
        assert way.state.recall is not None
        self.recall = way.state.recall.fill_(1.0)
        query, out = self.queries[number], torch.empty(ROWS, QUERY_HEADS, HEAD)
        batch = StepBatch(decode=_batch(seq_lens), prefill=None)
        views = kv_views(self.cache, ORDER)
        LayerStep(replace(plan, decode=way), batch, self.ops, views, SCALE).attend(query, out)
        return out, way.selection.logical_blocks.clone()


def test_due_rows_select_and_the_others_read_what_they_selected() -> None:
    layer = _Layer()
    first, second = [340, 200, 300], [341, 201, 301]
    slots = [2, 0, 1]
    plain_out, plain = layer.step(0, first, None, slots)
    out, chosen = layer.step(0, first, [0, 1, 2], slots)
    assert torch.equal(chosen, plain)
    torch.testing.assert_close(out, plain_out)

    _, fresh = layer.step(1, second, None, slots)
    assert not torch.equal(fresh, plain), "the queries choose alike: nothing is tested"
    out, chosen = layer.step(1, second, [1], slots)
    expected = torch.stack([plain[0], fresh[1], plain[2]])
    assert torch.equal(chosen, expected)
    # Recall is known of the rows that selected.
    own = layer.recall[:, 0].tolist()
    assert own[0] == own[2] == 1.0
    assert own[1] < 1.0

    out, chosen = layer.step(2, [342, 202, 302], [], slots)
    assert torch.equal(chosen, expected)
    # The output is attention over just these blocks.
    reference = torch.empty_like(out)
    layer.ops.sparse_decode.run(
        layer.queries[2],
        *kv_views(layer.cache, ORDER),
        _batch([342, 202, 302]),
        BlockSelection(expected, (expected >= 0).sum(2).to(torch.int32)),
        None,
        SCALE,
        reference,
    )
    torch.testing.assert_close(out, reference)


def test_rows_that_moved_find_their_selection() -> None:
    layer = _Layer()
    _, chosen = layer.step(0, [340, 200, 300], [0, 1, 2], [2, 0, 1])
    _, moved = layer.step(1, [200, 300, 340], [], [0, 1, 2])
    assert torch.equal(moved, chosen[[1, 2, 0]])


def test_rows_that_keep_everything_are_read_whole_and_not_scored() -> None:
    layer = _Layer()
    rows = step_rows([340, 100, 128], {0: RowOptions(is_dense=True)}, IDS)
    plan = layer.selector.plan(rows).layers[0]
    assert isinstance(plan.decode, Anchor)
    assert plan.decode.state.scored_lens.tolist() == [1, 1, 1]
    query, out = layer.queries[0], torch.empty(ROWS, QUERY_HEADS, HEAD)
    batch = StepBatch(decode=_batch([340, 100, 128]), prefill=None)
    views = kv_views(layer.cache, ORDER)
    LayerStep(plan, batch, layer.ops, views, SCALE).attend(query, out)
    dense = torch.empty_like(out)
    LayerStep(LayerPlan(Dense()), batch, layer.ops, views, SCALE).attend(query, dense)
    torch.testing.assert_close(out, dense)
    assert plan.decode.state.recall is not None
    assert plan.decode.state.recall[:, 0].tolist() == [1.0] * ROWS


def test_an_audit_reads_everything_in_one_row_alone() -> None:
    layer = _Layer()
    plan = layer.selector.plan(step_rows([340, 340, 340])).layers[0]
    wide = reading_everything(plan, 1)
    for one in (plan, wide):
        assert isinstance(one.decode, Anchor)
    assert plan.decode.state.budget_blocks.tolist() == [4, 4, 4]
    assert wide.decode.state.budget_blocks.tolist() == [4, BLOCKS, 4]
    checked = Checked(torch.tensor([1]), torch.ones(2, 3))
    reuse = LayerPlan(Reuse(plan.decode.selection, plan.decode.state, checked))
    assert reading_everything(reuse, 1).decode == replace(reuse.decode, checked=None)
    assert reading_everything(LayerPlan(Dense()), 1) == LayerPlan(Dense())


def test_a_split_layer_refuses_what_it_would_serve_wrongly() -> None:
    layer = _Layer()
    choosing = layer.selector.plan(step_rows([340, 200, 300])).layers[0]
    witnessed = LayerPlan(Dense(), witness=lambda query, key_cache, batch, scale: None)
    batch = StepBatch(decode=_batch([340, 200, 300]), prefill=None)
    places = HeadPlaces([0] * KV_HEADS, range(KV_HEADS), BLOCK, CPU)
    for plan in (choosing, witnessed):
        step = LayerStep(plan, batch, layer.ops, kv_views(layer.cache, ORDER), SCALE)
        with pytest.raises(TypeError, match="heads keep different blocks cannot follow"):
            SplitLayerStep(step, SplitRows(KV_HEADS, None, None), places)


def test_a_witness_sees_the_prefill_rows_alone() -> None:
    layer = _Layer()
    seen: list[tuple[torch.Tensor, list[int]]] = []

    def witness(
        query: torch.Tensor, key_cache: torch.Tensor, batch: PagedBatch, scale: float
    ) -> None:
        assert (key_cache.shape[1:], scale) == ((KV_HEADS, BLOCK, HEAD), SCALE)
        seen.append((query, batch.seq_lens.tolist()))

    # One decode row, then two rows of one prompt token each.
    batch = StepBatch.split(_batch([340, 100, 7]), 1, BLOCKS * BLOCK)
    query, out = layer.queries[0], torch.empty(ROWS, QUERY_HEADS, HEAD)
    views = kv_views(layer.cache, ORDER)
    plan = LayerPlan(Dense(), witness=witness)
    LayerStep(plan, batch, layer.ops, views, SCALE).attend(query, out)
    ((got, lengths),) = seen
    assert torch.equal(got, query[1:])
    assert lengths == [100, 7]
