"""``reselect_steps`` in the planner and at start: which rows are due, what is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from attn_backends.adapter.entries import SplitEngine
from attn_backends.adapter.planning import StepPlanner
from attn_backends.adapter.requests import BOOK
from attn_backends.batch import RowOptions
from attn_backends.config import ConfigError, EngineFacts
from attn_backends.method import Geometry
from attn_backends.methods.tidal_decode import METHOD, TidalConfig, _checking_every_age
from attn_backends.plan import Anchor, LayerRole

ROWS, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, BLOCKS = 3, 2, 4, 32, 32, 12
CPU = torch.device("cpu")


def test_the_planner_tells_due_rows_by_request(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry(3, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, ROWS, BLOCKS * BLOCK)
    config = TidalConfig(reselect_steps=8, min_context_tokens=0, recall_floor=0.5)
    schedule = METHOD.schedule(config, geometry)
    selector = METHOD.make_selector(config, schedule, geometry, CPU)
    planner = StepPlanner(selector, schedule, None, SplitEngine(geometry, 64))
    anchor = schedule.of_role(LayerRole.SELF)[0]
    ids, asked = ["a", "b", "c"], dict[int, RowOptions]()
    monkeypatch.setattr(BOOK, "row_ids", lambda places: ids)
    monkeypatch.setattr(BOOK, "num_rows", len(ids))
    monkeypatch.setattr(BOOK, "of_rows", lambda ids: asked)
    by_slot: dict[int, str] = {}

    def step(seq_lens: list[int]) -> tuple[list[int], list[str]]:
        """Rows that choose anew, and whose kept selection each row reads."""
        lengths = torch.tensor(seq_lens, dtype=torch.int32)
        plan = planner.plan("a builder", lengths, lengths, len(seq_lens))
        assert planner.plan("another one", lengths, lengths, len(seq_lens)) is plan
        way = plan.layers[anchor].decode
        assert isinstance(way, Anchor)
        assert way.kept is not None
        due = [] if way.kept.due is None else way.kept.due.tolist()
        slots = way.kept.slots.tolist()
        return due, [by_slot.setdefault(slot, ids[row]) for row, slot in enumerate(slots)]

    assert step([340, 200, 300]) == ([0, 1, 2], ids)
    assert step([341, 201, 301]) == ([1], ids)
    ids.reverse()
    asked[1] = RowOptions(budget_tokens=256)
    assert step([302, 202, 342]) == ([1], ids)


def test_guard_checks_see_selections_of_every_age() -> None:
    config = TidalConfig(reselect_steps=8, recall_floor=0.5)
    assert _checking_every_age(config).guard_interval_steps == 65


def test_intervals_that_cannot_be_honoured_are_refused() -> None:
    with pytest.raises(ConfigError, match="reselect_steps is 0; it must be between 1"):
        TidalConfig(reselect_steps=0)
    with pytest.raises(ConfigError, match=r"reselect_steps is 4, but anchors .* to selected"):
        TidalConfig(reselect_steps=4, anchor_attention="full")
    with pytest.raises(ConfigError, match=r"reselect_steps is 5, .* 1, 2, 4, 8, 16, 32"):
        TidalConfig(reselect_steps=5).check(EngineFacts("cpu", 32, 1))
    TidalConfig(reselect_steps=32).check(EngineFacts("cpu", 64, 1))
    with pytest.raises(ConfigError, match="reselect_steps is 4, but on GPUs"):
        TidalConfig(reselect_steps=4).check(EngineFacts("cuda", 32, 1))
    TidalConfig(reselect_steps=4).check(EngineFacts("cpu", 32, 2))
