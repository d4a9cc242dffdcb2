"""TIDAL_DECODE: settings, schedule from a profile, budgets and reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_backends.batch import RowOptions
from attn_backends.config import ConfigError
from attn_backends.methods.sink_window import METHOD as SINK_WINDOW
from attn_backends.methods.sink_window import SinkWindowConfig
from attn_backends.methods.tidal_decode import METHOD, TidalConfig, _warn_once
from attn_backends.plan import Anchor, Dense, LayerRole, LayerSchedule, Reuse, StepPlan
from tests.batches import SIX_LAYERS, anchor_state, labels, step_rows

PROFILE: dict[str, Any] = {
    "schema_version": 1,
    "fingerprint": "0" * 64,
    "model": "tiny",
    "num_layers": 6,
    "num_kv_heads": 2,
    "dense_layers": [0],
    "anchor_layers": [1, 4],
    "head_maps": {"2": [1, 0]},
    "calibration": {},
}


def _written(folder: Path, **changes: Any) -> Path:
    path = folder / "profile.json"
    path.write_text(json.dumps(PROFILE | changes))
    return path


def test_the_schedule_follows_the_profile(tmp_path: Path) -> None:
    config = TidalConfig(profile=str(_written(tmp_path)))
    schedule = METHOD.schedule(config, SIX_LAYERS)
    dense, anchor, reuse = LayerRole.DENSE, LayerRole.SELF, LayerRole.REUSE
    assert schedule.roles == (dense, anchor, reuse, reuse, anchor, reuse)
    assert schedule.head_maps == {2: (1, 0)}


def test_anchors_may_attend_everything(tmp_path: Path) -> None:
    path = str(_written(tmp_path))
    schedule = METHOD.schedule(TidalConfig(profile=path, anchor_attention="full"), SIX_LAYERS)
    dense, anchor, reuse = LayerRole.DENSE, LayerRole.ANCHOR, LayerRole.REUSE
    assert schedule.roles == (dense, anchor, reuse, reuse, anchor, reuse)
    assert schedule.head_maps == {2: (1, 0)}
    with pytest.raises(ConfigError, match=r"anchor_attention is 'none'.*selected, full"):
        TidalConfig(anchor_attention="none")


def test_layers_of_a_profile_are_dropped(tmp_path: Path) -> None:
    path = _written(tmp_path, dense_layers=[], drop_layers=[0, 2])
    dense, anchor, reuse = LayerRole.DENSE, LayerRole.SELF, LayerRole.REUSE
    schedule = METHOD.schedule(TidalConfig(profile=str(path)), SIX_LAYERS)
    assert schedule.roles == (LayerRole.DROP, anchor, LayerRole.DROP, reuse, anchor, reuse)
    assert schedule.dropped == (0, 2)
    assert schedule.head_maps == {}  # a dropped layer follows nobody
    sinks = SINK_WINDOW.schedule(SinkWindowConfig(profile=str(path)), SIX_LAYERS)
    window = LayerRole.WINDOW
    assert sinks.roles == (LayerRole.DROP, window, LayerRole.DROP, *[window] * 3)
    path = _written(tmp_path, drop_layers=[2], full_layers=[3])
    sinks = SINK_WINDOW.schedule(SinkWindowConfig(profile=str(path)), SIX_LAYERS)
    assert sinks.roles == (window, window, LayerRole.DROP, dense, window, window)


def test_without_a_profile_there_is_a_warning_and_a_safe_default(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _warn_once.cache_clear()
    schedule = METHOD.schedule(TidalConfig(), SIX_LAYERS)
    assert METHOD.schedule(TidalConfig(), SIX_LAYERS) == schedule
    assert schedule.roles[2] is LayerRole.SELF
    assert caplog.text.count("no profile") == 1
    assert "vllm-ext profile" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget_tokens": -1}, "budget_tokens is -1"),
        ({"budget_tokens": 64}, "less than sink_tokens"),
        ({"recent_tokens": -3}, "recent_tokens is -3"),
        ({"budget_fraction": 1.5}, "budget_fraction is 1.5"),
    ],
)
def test_impossible_budgets_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TidalConfig(**settings)


def _plan(config: TidalConfig, seq_lens: list[int], options: dict[int, RowOptions]) -> StepPlan:
    schedule = METHOD.schedule(config, SIX_LAYERS)
    selector = METHOD.make_selector(config, schedule, SIX_LAYERS, torch.device("cpu"))
    return selector.plan(step_rows(seq_lens, options))


def _budgets(config: TidalConfig, seq_lens: list[int], options: dict[int, RowOptions]) -> list[int]:
    state = anchor_state(_plan(config, seq_lens, options))
    assert (state.sink_blocks, state.recent_blocks) == (1, 2)
    return state.budget_blocks.tolist()


def test_budgets_by_row_and_reasons() -> None:
    config = TidalConfig(budget_tokens=512, min_context_tokens=1000)
    seq_lens = [1000, 1001, 4000]
    assert _budgets(config, seq_lens, {}) == [128, 16, 16]
    options = {1: RowOptions(is_dense=True), 2: RowOptions(budget_tokens=4096)}
    assert _budgets(config, seq_lens, options) == [128, 128, 128]
    short, selected = ("dense", "short_context"), ("sparse", "selected")
    assert labels(_plan(config, seq_lens, {})) == [short, selected, selected]
    assert labels(_plan(config, seq_lens, options)) == [
        short,
        ("dense", "request_off"),
        ("sparse", "everything_kept"),
    ]
    by_guard = {
        1: RowOptions(is_dense=True, is_guarded=True),
        2: RowOptions(budget_factor=2.0, is_guarded=True),
    }
    assert labels(_plan(config, seq_lens, by_guard)) == [
        short,
        ("dense", "guard"),
        ("sparse", "guard_raised"),
    ]


def test_layers_go_the_ways_of_their_roles(tmp_path: Path) -> None:
    plan = _plan(TidalConfig(profile=str(_written(tmp_path))), [4000], {})
    ways = [type(plan.layers[layer].decode) for layer in range(6)]
    assert ways == [Dense, Anchor, Reuse, Reuse, Anchor, Reuse]
    first, second = plan.layers[1].decode, plan.layers[4].decode
    assert isinstance(first, Anchor)
    assert isinstance(second, Anchor)
    assert (first.inherits, second.inherits) == (False, True)
    mapped, plain = plan.layers[2].decode, plan.layers[3].decode
    assert isinstance(mapped, Reuse)
    assert isinstance(plain, Reuse)
    assert mapped.selection.heads is not None
    assert mapped.selection.heads.tolist() == [1, 0]
    assert plain.selection.heads is None
    # What an anchor writes is what they read.
    assert plain.selection is first.selection is second.selection
    assert mapped.selection.logical_blocks is first.selection.logical_blocks
    assert mapped.selection.counts is first.selection.counts


def test_a_share_of_the_context_is_a_budget_unless_a_request_says_its_own() -> None:
    config = TidalConfig(budget_tokens=512, budget_fraction=0.25)
    seq_lens = [1600, 3200, 3200, 3200]
    options = {2: RowOptions(budget_tokens=256), 3: RowOptions(budget_factor=0.5)}
    assert _budgets(config, seq_lens, options) == [16, 25, 8, 13]
    everything = TidalConfig(budget_fraction=1.0)
    assert _budgets(everything, [4000], {}) == [125]
    assert labels(_plan(everything, [4000], {})) == [("sparse", "everything_kept")]


def test_a_preset_never_undercuts_the_forced_blocks() -> None:
    config = TidalConfig(budget_tokens=96)
    assert _budgets(config, [4000], {0: RowOptions(budget_factor=0.5)}) == [3]


def test_reuse_needs_an_anchor_before_it() -> None:
    with pytest.raises(ValueError, match="layer 1 reuses"):
        LayerSchedule((LayerRole.DENSE, LayerRole.REUSE, LayerRole.ANCHOR))
