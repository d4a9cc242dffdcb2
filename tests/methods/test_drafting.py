"""Drafts by themselves: what the first one chooses, what later ones read, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attn_backends.batch import RowOptions
from attn_backends.budget import prompts_cached
from attn_backends.budget_config import BudgetConfig
from attn_backends.config import EngineFacts, SettingError, parse_config
from attn_backends.drafting import DraftSelector, check_drafting
from attn_backends.layer_step import LayerStep, StepBatch
from attn_backends.method import Geometry, StepRows
from attn_backends.methods import load_method
from attn_backends.ops.dispatch import OpContext, OpImpl
from attn_backends.ops.resolution import ORDER_OF_DEVICE, Ops, resolve_ops
from attn_backends.plan import DENSE_LAYER, LayerRole, LayerSchedule, StepPlan
from kvcache.entries import layer_entries
from kvcache.layout import PagedKVLayout, kv_views
from kvcache.retention import KeepAll, SpanRetention
from kvcache.spans import Span
from tests.batches import decode_batch, step_rows

ROWS, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, BLOCKS = 3, 2, 4, 32, 32, 16
GEOMETRY = Geometry(4, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, ROWS, BLOCKS * BLOCK)
SCHEDULE = LayerSchedule(
    (LayerRole.DENSE, LayerRole.SELF, LayerRole.REUSE, LayerRole.SELF), {2: (1, 0)}
)
SETTINGS = {"budget_tokens": 128, "sink_tokens": 32, "recent_tokens": 32, "min_context_tokens": 0}
LENGTHS = [340, 200, 319]  # the last one's block is full
ORDER = ORDER_OF_DEVICE["cpu"]
SCALE = HEAD**-0.5
CPU = torch.device("cpu")


class _Model:
    """Layers without anything but attention, over caches of random keys and values."""

    def __init__(self, num_drafts: int) -> None:
        generator = torch.Generator().manual_seed(0)
        layout = PagedKVLayout(ROWS * BLOCKS, BLOCK, KV_HEADS, HEAD, torch.float32, ORDER)
        shape = (len(SCHEDULE.roles), ROWS * BLOCKS, KV_HEADS, BLOCK, 2 * HEAD)
        self.caches = torch.randn(shape, generator=generator)
        self.queries = torch.randn(num_drafts, ROWS, QUERY_HEADS, HEAD, generator=generator)
        ops = resolve_ops(OpContext(layout, QUERY_HEADS, "cpu", with_rule=False), "reference")
        self.called: list[str] = []
        spied = {name: self._spied(getattr(ops, name)) for name in Ops.__dataclass_fields__}
        self.ops = Ops(**spied)
        method = load_method("ORACLE_TOPK")
        config = parse_config(
            method.config_cls, SETTINGS | {"lossless_tokens": num_drafts}, method.name
        )
        selector = method.make_selector(config, SCHEDULE, GEOMETRY, CPU)
        assert isinstance(selector, DraftSelector)
        self.selector = selector

    def _spied(self, impl: OpImpl) -> OpImpl:
        def run(*args: Any) -> None:
            self.called.append(impl.op)
            impl.run(*args)

        return replace(impl, run=run)

    def draft(self, index: int, options: dict[int, RowOptions] | None = None) -> list[torch.Tensor]:
        """Each layer's output of one draft."""
        seq_lens = [length + index for length in LENGTHS]
        rows = replace(step_rows(seq_lens, options), draft_index=index)
        return self.run(self.selector.plan(rows), index, seq_lens)

    def run(self, plan: StepPlan, index: int, seq_lens: list[int]) -> list[torch.Tensor]:
        """Each layer's output under a plan."""
        self.called.clear()
        table = torch.arange(ROWS * BLOCKS, dtype=torch.int32).view(ROWS, BLOCKS)
        batch = StepBatch(decode=decode_batch(seq_lens, table), prefill=None)
        outs = []
        for layer in range(len(SCHEDULE.roles)):
            out = torch.empty(ROWS, QUERY_HEADS, HEAD)
            views = kv_views(self.caches[layer], ORDER)
            step = LayerStep(plan.layers[layer], batch, self.ops, views, SCALE)
            step.attend(self.queries[index], out)
            outs.append(out)
        return outs


def test_the_first_draft_chooses_as_a_plain_row_does() -> None:
    model = _Model(num_drafts=1)
    method = load_method("ORACLE_TOPK")
    config = parse_config(method.config_cls, SETTINGS, method.name)
    plain = method.make_selector(config, SCHEDULE, GEOMETRY, CPU).plan(step_rows(LENGTHS))
    expected = model.run(plain, 0, LENGTHS)
    torch.testing.assert_close(model.draft(0), expected)


@pytest.mark.parametrize("num_drafts", [3, 40])  # more than a KV block
def test_later_drafts_read_what_the_first_chose_and_the_blocks_that_they_begin(
    num_drafts: int,
) -> None:
    model = _Model(num_drafts)
    model.draft(0)
    assert model.called.count("anchor_decode") == 2
    chosen = {layer: kept.logical_blocks.clone() for layer, kept in model.selector._kept.items()}
    assert not torch.equal(chosen[1], chosen[3]), "the anchors choose alike: nothing is tested"
    for index in range(1, num_drafts):
        outs = model.draft(index)
        assert set(model.called) == {"dense_decode", "sparse_decode"}
        for layer, anchor, heads in ((1, 1, (0, 1)), (2, 1, (1, 0)), (3, 3, (0, 1))):
            for row in range(ROWS):
                _equals_attention(model, outs[layer], layer, index, row, chosen[anchor], heads)
    for layer, kept in model.selector._kept.items():
        assert torch.equal(kept.logical_blocks, chosen[layer])


def _equals_attention(
    model: _Model,
    out: torch.Tensor,
    layer: int,
    index: int,
    row: int,
    chosen: torch.Tensor,
    heads: tuple[int, ...],
) -> None:
    """Of one row: over its blocks, up to and with its current token, which is always seen."""
    seq_len = LENGTHS[row] + index
    keys, values = kv_views(model.caches[layer], ORDER)
    for head, source in enumerate(heads):
        blocks = [block for block in chosen[row, source].tolist() if block >= 0]
        assert (seq_len - 1) // BLOCK in blocks
        tokens = torch.tensor([b * BLOCK + i for b in blocks for i in range(BLOCK)])
        tokens = tokens[tokens < seq_len]
        where = row * BLOCKS + tokens // BLOCK, head, tokens % BLOCK
        group = slice(2 * head, 2 * head + 2)
        weights = (model.queries[index, row, group] @ keys[where].T * SCALE).softmax(-1)
        torch.testing.assert_close(out[row, group], weights @ values[where])


@pytest.mark.parametrize("options", [{}, {0: RowOptions(is_dense=True)}])
def test_rows_that_keep_everything_draft_as_dense_rows_do(options: dict[int, RowOptions]) -> None:
    model = _Model(num_drafts=40)
    # As long as the last row, when it chooses.
    wide = dict.fromkeys(range(ROWS), RowOptions(budget_tokens=320)) | options
    dense_plan = StepPlan(dict.fromkeys(range(len(SCHEDULE.roles)), DENSE_LAYER), ())
    kept = [1, 2, *options]
    for index in range(40):
        outs = model.draft(index, wide)
        dense = model.run(dense_plan, index, [length + index for length in LENGTHS])
        for out, expected in zip(outs, dense, strict=True):
            torch.testing.assert_close(out[kept], expected[kept])


def test_a_step_s_drafts_have_the_same_rows() -> None:
    model = _Model(num_drafts=3)
    model.draft(0)
    rows = StepRows(torch.tensor([341], dtype=torch.int32), torch.tensor([341]), 1, draft_index=1)
    with pytest.raises(RuntimeError, match="draft 1 has 1 rows, the first one had 3"):
        model.selector.plan(rows)


def test_what_was_generated_serves_later_prompts_once_it_is_verified() -> None:
    for tokens, is_cached in ((0, False), (3, True)):
        config = BudgetConfig(lossless_tokens=tokens)
        entries = prompts_cached(config, SCHEDULE, GEOMETRY)
        assert {entry.policy for entry in entries} == {KeepAll(caches_generated=is_cached)}


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("TIDAL_DECODE", {"recall_floor": 0.5}, "recall_floor is 0.5, but lossless_tokens is 3"),
        ("TIDAL_DECODE", {"audit_share": 0.1}, "set audit_share to 0, or lossless_tokens to 0"),
        ("TIDAL_DECODE", {"reselect_steps": 2}, "set reselect_steps to 1"),
        ("TIDAL_DECODE", {"anchor_attention": "full"}, "set anchor_attention to selected"),
        ("TIDAL_DECODE", {"strict": False}, "strict is off, but lossless_tokens is 3"),
        ("SINK_WINDOW", {}, "retention is 'evict', but .* set retention to keep_all"),
        ("TIDAL_DECODE", {"lossless_tokens": 65}, "lossless_tokens is 65; it must be between 0"),
    ],
)
def test_each_setting_that_drafts_would_not_honour_is_named(
    method: str, settings: dict[str, Any], words: str
) -> None:
    config_cls = load_method(method).config_cls
    with pytest.raises(SettingError, match=words):
        parse_config(config_cls, {"lossless_tokens": 3, **settings}, method)


def test_engines_that_have_not_drafted_are_refused() -> None:
    facts = EngineFacts("cpu", 32, 2)
    BudgetConfig().check(facts)
    with pytest.raises(SettingError, match="2 workers of a replica"):
        BudgetConfig(lossless_tokens=3).check(facts)


def test_what_a_dense_pass_needs_must_be_there() -> None:
    kept = layer_entries((KeepAll(),) * 4, ())
    check_drafting(SCHEDULE, kept)
    dropping = LayerSchedule((LayerRole.DENSE, LayerRole.DROP))
    with pytest.raises(ValueError, match=r"layers \[1\] are dropped in the profile"):
        check_drafting(dropping, layer_entries((KeepAll(),) * 2, dropping.dropped))
    freeing = layer_entries((KeepAll(), SpanRetention(Span(32, 64))), ())
    with pytest.raises(ValueError, match=r"layers \[1\] free KV blocks"):
        check_drafting(SCHEDULE, freeing)
