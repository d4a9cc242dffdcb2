"""Layers of one policy in several KV groups: one selection, and windows of their own."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from attn_backends.adapter.sharing import _SELECTORS, shared_selector
from attn_backends.adapter.windows import WindowPlans
from attn_backends.budget import BudgetConfig, BudgetSelector
from attn_backends.config import ConfigError
from attn_backends.method import Geometry
from attn_backends.plan import DecodePlan, LayerRole, LayerSchedule, Window
from tests.batches import decode_batch
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


def _make() -> BudgetSelector:
    return BudgetSelector(BudgetConfig(), GEOMETRY, CPU)


def test_builders_of_one_engine_share_a_selector_and_engines_do_not() -> None:
    engine, other = torch.nn.Identity(), torch.nn.Identity()
    first = shared_selector(engine, GEOMETRY, _make)
    assert shared_selector(engine, replace(GEOMETRY, num_query_heads=8), _make) is first
    assert shared_selector(other, GEOMETRY, _make) is not first
    with pytest.raises(ConfigError, match="num_kv_heads 1 and 2 cannot share"):
        shared_selector(engine, replace(GEOMETRY, num_kv_heads=1), _make)


def test_a_selector_goes_with_its_engine() -> None:
    engine = torch.nn.Identity()
    shared_selector(engine, GEOMETRY, _make)
    before = len(_SELECTORS)
    del engine
    gc.collect()
    assert len(_SELECTORS) < before


def _plan(**parts: Any) -> DecodePlan:
    """Whatever else a plan has, in other versions of it, is none of the windows' business."""
    from dataclasses import fields

    given = {"decode": None, "prefill": None, "decodes_densely": True, **parts}
    return DecodePlan(**{field.name: given.get(field.name) for field in fields(DecodePlan)})


def test_layers_with_a_window_get_the_rows_through_it() -> None:
    wide, narrow = Window(32, 256), Window(0, 32)
    windows = WindowPlans({"a": wide, "b": narrow, "c": wide}, GEOMETRY, CPU)
    decode, prefill = decode_batch([1000, 100]), decode_batch([500])
    roles = {"a": LayerRole.SELECTED}
    plans = windows.of_step(_plan(decode=decode, prefill=prefill, roles=roles))
    assert set(plans) == {"a", "b", "c"}
    assert plans["a"] is plans["c"]
    for name, window in (("a", wide), ("b", narrow)):
        plan = plans[name]
        assert plan.decode is decode
        assert plan.roles is roles
        assert plan.anchor is None
        assert not plan.decodes_densely
        assert plan.selection is not None
        for row, seq_len in enumerate([1000, 100]):
            read = plan.selection.logical_blocks[row, 0].tolist()
            seen = {
                token // 32
                for token in range(seq_len)
                if token < window.sink_tokens or token >= seq_len - window.window_tokens
            }
            assert sorted(block for block in read if block >= 0) == sorted(seen)
        for rule, rows in ((plan.decode_rule, 2), (plan.prefill_rule, 1)):
            assert rule is not None
            span = [window.sink_tokens, window.window_tokens, 0, 0]
            assert rule.values.tolist() == [[span] * 2] * rows


def test_without_rows_or_windows_there_is_nothing_to_plan() -> None:
    windows = WindowPlans({"a": Window(0, 32)}, GEOMETRY, CPU)
    plan = windows.of_step(_plan(decode=decode_batch([64])))["a"]
    assert plan.prefill_rule is None
    assert WindowPlans({}, GEOMETRY, CPU).of_step(_plan(decode=decode_batch([64]))) == {}


def test_off_is_refused_where_a_window_holds_for_everyone(monkeypatch: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    from attn_backends.config import parse_config
    from attn_backends.methods import load_method

    method = load_method("TIDAL_DECODE")
    policy = {"presets": {"deep": {"budget_tokens": 2048}}}
    config = parse_config(method.config_cls, {"policy": policy}, method.name)
    windowed = LayerSchedule((LayerRole.SELECTED,), windows={0: Window(64, 512)})
    served = {"method": method, "config": config, "is_served": True, "schedule": windowed}
    monkeypatch.setattr(selection, "_active", served)
    selection.check_request({"sparse": "deep"}, "cpu")
    with pytest.raises(VLLMValidationError, match="one of on, off, fast, accurate, deep"):
        selection.check_request({"sparse": "depe"}, "cpu")
    with pytest.raises(VLLMValidationError, match="policy has window layers"):
        selection.check_request({"sparse": "off"}, "cpu")
    served["schedule"] = LayerSchedule((LayerRole.DENSE,))
    selection.check_request({"sparse": "off"}, "cpu")


def test_options_are_refused_where_no_method_is_known(monkeypatch: Any) -> None:
    """A configuration that came from another process was never prepared in this one."""
    from vllm.exceptions import VLLMValidationError

    monkeypatch.setattr(selection, "_active", {})
    selection.check_request({"kv_transfer_params": {}}, "cpu")
    selection.check_request(None, "cpu")
    monkeypatch.setattr(selection, "_active", {"method": None})  # stock vLLM, beside our plugin
    selection.check_request({"sparse": ["x"]}, "cpu")
    monkeypatch.setattr(selection, "_active", {})
    for extra_args in ({"sparse": ["x"]}, {"budget_tokens": "abc"}, {"sparse": "off"}):
        with pytest.raises(VLLMValidationError, match="another process"):
            selection.check_request(extra_args, "cpu")
