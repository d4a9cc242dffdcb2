"""Layers of one policy in several KV groups: one selection, and windows of their own."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from attn_backends.adapter.entries import SplitEngine
from attn_backends.adapter.planning import _PLANNERS, StepPlanner, shared_planner
from attn_backends.adapter.requests import BOOK
from attn_backends.budget import BudgetSelector
from attn_backends.budget_config import BudgetConfig
from attn_backends.config import ConfigError
from attn_backends.method import Geometry
from attn_backends.plan import LayerRole, LayerSchedule, Selected
from kvcache.spans import Span
from vllm_ext.platforms import selection

CPU = torch.device("cpu")
GEOMETRY = Geometry(
    num_layers=4,
    num_kv_heads=2,
    num_query_heads=4,
    head_size=64,
    block_size=32,
    max_num_reqs=4,
    max_model_len=1024,
)


REUSING = LayerSchedule((LayerRole.SELF, LayerRole.REUSE))
WINDOWS = LayerSchedule((LayerRole.WINDOW,), spans={0: (Span(0, 64),) * 2})


class _Counters:
    """Collects what is counted."""

    def __init__(self) -> None:
        self.rows: Counter[tuple[str, str]] = Counter()

    def add(self, rows: Counter[tuple[str, str]]) -> None:
        self.rows += rows

    def show_recall(self, watch: Any) -> None:
        """Not looked at."""


def _make(schedule: LayerSchedule = REUSING, counters: Any = None) -> StepPlanner:
    selector = BudgetSelector(BudgetConfig(), schedule, GEOMETRY, CPU)
    return StepPlanner(selector, schedule, counters, SplitEngine(GEOMETRY, 64))


def test_builders_of_one_engine_share_a_planner_and_engines_do_not() -> None:
    engine, other = torch.nn.Identity(), torch.nn.Identity()
    firsts = []

    def make(is_first: bool) -> StepPlanner:
        firsts.append(is_first)
        return _make()

    first = shared_planner(engine, GEOMETRY, REUSING, make)
    assert shared_planner(engine, replace(GEOMETRY, num_query_heads=8), REUSING, make) is first
    assert shared_planner(other, GEOMETRY, REUSING, make) is not first
    one_head = replace(GEOMETRY, num_kv_heads=1)
    with pytest.raises(ConfigError, match=r"layers of 1 and of 2 KV heads.*cannot share"):
        shared_planner(engine, one_head, REUSING, make)
    # Nothing is shared where every layer reads its own.
    assert shared_planner(engine, one_head, WINDOWS, make) is not first
    assert firsts == [True, True, False]  # one of an engine's planners counts


def test_a_planner_goes_with_its_engine() -> None:
    engine = torch.nn.Identity()
    shared_planner(engine, GEOMETRY, REUSING, lambda is_first: _make())
    before = len(_PLANNERS)
    del engine
    gc.collect()
    assert len(_PLANNERS) < before


def test_a_step_is_planned_and_counted_once_for_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = _Counters()
    planner = _make(counters=counters)
    monkeypatch.setattr(BOOK, "num_rows", 2)
    lengths = torch.tensor([40, 900], dtype=torch.int32)
    for step in (1, 2):
        plans = [planner.plan(builder, lengths, lengths, 2) for builder in ("a", "b", "c")]
        assert plans[0] is plans[1] is plans[2]
        assert counters.rows["dense", "short_context"] == 2 * step


def test_builders_that_are_made_anew_get_no_old_plan() -> None:
    """As vLLM makes them twice where it profiles graphs."""
    engine = torch.nn.Identity()
    make: Any = lambda is_first: _make()  # noqa: E731
    planner = shared_planner(engine, GEOMETRY, REUSING, make)
    old = planner.plan("an old builder", torch.tensor([40, 900], dtype=torch.int32), None, 2)
    assert shared_planner(engine, GEOMETRY, REUSING, make) is planner
    new = planner.plan("a new builder", torch.tensor([40, 900], dtype=torch.int32), None, 2)
    assert new is not old


def test_layers_of_a_policy_get_the_rows_through_their_window() -> None:
    wide, narrow = Span(32, 256), Span(0, 32)
    spans = {0: (wide,) * 2, 3: (narrow,) * 2}
    window, anchor, reuse = LayerRole.WINDOW, LayerRole.SELF, LayerRole.REUSE
    planner = _make(LayerSchedule((window, anchor, reuse, window), spans=spans))
    lengths = torch.tensor([1000, 100], dtype=torch.int32)
    plan = planner.plan("a builder", lengths, lengths, num_rows=3)
    assert plan.layers[1].rule is None
    for layer, span in ((0, wide), (3, narrow)):
        own = plan.layers[layer]
        assert isinstance(own.decode, Selected)
        assert own.rule is not None
        assert own.rule.values.shape == (3, 2, 1, 4)  # the prefill row, too
        for row, seq_len in enumerate([1000, 100]):
            read = own.decode.selection.logical_blocks[row, 0].tolist()
            first = span.first_seen(seq_len)
            seen = {t // 32 for t in range(seq_len) if t < span.sink_tokens or t >= first}
            assert [block for block in read if block >= 0] == sorted(seen)


def test_off_is_refused_where_a_window_holds_for_everyone(monkeypatch: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    from attn_backends.config import parse_config
    from attn_backends.methods import load_method

    method = load_method("TIDAL_DECODE")
    policy = {"presets": {"deep": {"budget_tokens": 2048}}}
    config = parse_config(method.config_cls, {"policy": policy}, method.name)
    windowed = LayerSchedule((LayerRole.WINDOW,), spans={0: (Span(64, 512),)})
    served = {"method": method, "config": config, "is_served": True, "schedule": windowed}
    monkeypatch.setattr(selection, "_active", served)
    selection.check_request({"sparse": "deep"})
    with pytest.raises(VLLMValidationError, match="one of on, off, fast, accurate, deep"):
        selection.check_request({"sparse": "depe"})
    with pytest.raises(VLLMValidationError, match="policy has window layers"):
        selection.check_request({"sparse": "off"})
    served["schedule"] = LayerSchedule((LayerRole.DENSE,))
    selection.check_request({"sparse": "off"})


def test_off_is_taken_where_prompts_see_everything_and_the_kv_manager_learns_of_it(
    monkeypatch: Any,
) -> None:
    from vllm.exceptions import VLLMValidationError

    from attn_backends.methods import load_method

    method = load_method("FLUX")
    schedule = LayerSchedule(
        (LayerRole.WINDOW,), spans={0: (Span(64, 512),)}, prompts_see_everything=True
    )
    served = {"method": method, "config": method.config_cls(), "is_served": True}
    served |= {"schedule": schedule, "has_prefix_cache": True}
    monkeypatch.setattr(selection, "_active", served)
    selection.check_request({"sparse": "off"})
    with pytest.raises(VLLMValidationError, match="FLUX takes only sparse"):
        selection.check_request({"budget_tokens": 512})
    served["has_prefix_cache"] = False
    selection.check_request({"sparse": "on"})
    with pytest.raises(VLLMValidationError, match="this server has no prefix cache"):
        selection.check_request({"sparse": "off"})


def test_options_are_refused_where_no_method_is_known(monkeypatch: Any) -> None:
    """A configuration that came from another process was never prepared in this one."""
    from vllm.exceptions import VLLMValidationError

    monkeypatch.setattr(selection, "_active", {})
    selection.check_request({"kv_transfer_params": {}})
    selection.check_request(None)
    monkeypatch.setattr(selection, "_active", {"method": None})  # stock vLLM, beside our plugin
    selection.check_request({"sparse": ["x"]})
    monkeypatch.setattr(selection, "_active", {})
    for extra_args in ({"sparse": ["x"]}, {"budget_tokens": "abc"}, {"sparse": "off"}):
        with pytest.raises(VLLMValidationError, match="another process"):
            selection.check_request(extra_args)
