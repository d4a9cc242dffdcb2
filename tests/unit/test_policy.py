"""Policies: validation, composition with a schedule, budgets by length, presets."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from attn_backends.batch import RowOptions
from attn_backends.config import ConfigError, parse_config
from attn_backends.methods.sink_window import SinkWindowConfig
from attn_backends.methods.tidal_decode import METHOD, TidalConfig
from attn_backends.plan import LayerRole, LayerSchedule, StepPlan
from attn_backends.policy.composition import compose, retention_of
from attn_backends.policy.model import NO_POLICY, PolicyError
from attn_backends.policy.reading import parse_policy
from kvcache.retention import KeepAll, SpanRetention
from kvcache.spans import Span
from tests.batches import SIX_LAYERS, anchor_state, labels, step_rows

DENSE, ANCHOR, REUSE = LayerRole.DENSE, LayerRole.ANCHOR, LayerRole.REUSE
WINDOW_ROLE = LayerRole.WINDOW
# dense 0, anchors 1 and 4; layers 2, 3 follow 1, layer 5 follows 4.
BASE = LayerSchedule(
    (DENSE, ANCHOR, REUSE, REUSE, ANCHOR, REUSE), {2: (1, 0), 3: (0, 0), 5: (1, 1)}
)
WINDOW = {"role": "window", "sink_tokens": 8, "window_tokens": 64}
GEOMETRY = replace(SIX_LAYERS, max_num_reqs=64, max_model_len=8192)


def _config(**policy: Any) -> TidalConfig:
    return parse_config(TidalConfig, {"policy": policy}, "TIDAL_DECODE")


def _problem(policy: Any) -> str:
    with pytest.raises(PolicyError) as error:
        parse_config(TidalConfig, {"policy": policy}, "TIDAL_DECODE")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    return str(error.value).removeprefix("vllm_ext.policy: ")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([], "the policy must be an object of settings, layers, budgets, presets, got []"),
        ({"layer": []}, "layer is not known; did you mean layers?"),
        ({"x": 1}, "x is not known; choose from settings, layers, budgets, presets"),
        ({"layers": {}}, "layers must be a list, got {}"),
        ({"settings": {"budgt_tokens": 1}}, "did you mean budget_tokens?"),
        ({"settings": {"policy": {}}}, "settings.policy is not known"),
        ({"settings": {"budget_tokens": "9"}}, "settings.budget_tokens must be of type int"),
        ({"settings": {"budget_tokens": 64}}, "settings.budget_tokens is 64, less than sink"),
        ({"settings": {"sink_tokens": 900}}, "settings do not fit together: vllm_ext.budget"),
        ({"layers": [7]}, "layers[0] must be an object of layers, role, retention"),
        ({"layers": [{"role": "dense"}]}, "layers[0] has no layers"),
        ({"layers": [{"layers": 1}]}, "layers[0] has no role"),
        (
            {"layers": [{"layers": 0, "role": "dense"}, {"layers": 1, "role": "foo"}]},
            "layers[1].role is 'foo'; choose one of dense, anchor, reuse, window",
        ),
        ({"layers": [{"layers": 1, "role": ["dense"]}]}, "layers[0].role is ['dense']"),
        ({"layers": [{"layers": "3-1", "role": "dense"}]}, "layers[0].layers is '3-1'; layers asc"),
        ({"layers": [{"layers": "0-99999", "role": "dense"}]}, 'write 5, "0-3" or [1, 2]'),
        ({"layers": [{"layers": "0-9999", "role": "dense"}]}, "from 0 to at most 1023"),
        ({"layers": [{"layers": -1, "role": "dense"}]}, "layers[0].layers is -1"),
        ({"layers": [{"layers": True, "role": "dense"}]}, "layers[0].layers is True"),
        ({"layers": [{"layers": [], "role": "dense"}]}, "name at least one layer"),
        ({"layers": [{"layers": [1, "0-2"], "role": "dense"}]}, "and each once"),
        (
            {"layers": [{"layers": "0-4", "role": "dense"}, {"layers": 4, "role": "anchor"}]},
            "layers[1].layers has layer 4, which layers[0] has too; give it one role",
        ),
        ({"layers": [{"layers": 1, "role": "window"}]}, "layers[0] has no sink_tokens"),
        ({"layers": [{"layers": 1, **WINDOW, "window_tokens": 0}]}, "window_tokens is 0"),
        ({"layers": [{"layers": 1, **WINDOW, "retention": "none"}]}, "one of all, sink_window"),
        (
            {"layers": [{"layers": 1, "role": "dense", "retention": "sink_window"}]},
            "layers[0].retention is 'sink_window', but the role is dense",
        ),
        (
            {"layers": [{"layers": 1, "role": "dense", "window_tokens": 9}]},
            "layers[0].window_tokens is of role window only",
        ),
        ({"budgets": [{"budget_tokens": 512}]}, "budgets[0] has no up_to_tokens"),
        (
            {"budgets": [{"up_to_tokens": 2000, "budget_tokens": "most"}]},
            "budgets[0].budget_tokens is 'most'; it must be 1 to 1048576 tokens, or all",
        ),
        (
            {"budgets": [{"up_to_tokens": n, "budget_tokens": 512} for n in (4096, 4096)]},
            "budgets[1].up_to_tokens is 4096, not above the 4096 before it",
        ),
        (
            {"budgets": [{"up_to_tokens": 1024, "budget_tokens": 512}]},
            "budgets[0].up_to_tokens is 1024, but rows up to min_context_tokens = 1024",
        ),
        (
            {"budgets": [{"up_to_tokens": 4096, "budget_tokens": 95}]},
            "budgets[0].budget_tokens is 95, less than sink_tokens + recent_tokens = 96",
        ),
        ({"presets": {"fast": {"factor": 2}}}, "presets.fast is built in"),
        ({"presets": {"off": {"factor": 2}}}, "presets.off is built in"),
        ({"presets": {"A b": {"factor": 2}}}, "presets.A b is no name"),
        ({"presets": {"deep": {}}}, "presets.deep must have budget_tokens or factor, one of them"),
        ({"presets": {"deep": {"factor": 1, "budget_tokens": 512}}}, "one of them"),
        ({"presets": {"deep": {"factor": 0}}}, "presets.deep.factor is 0; it must be a number"),
        ({"presets": {"deep": {"factor": float("nan")}}}, "presets.deep.factor is nan"),
        ({"presets": {"deep": {"budget_tokens": 5}}}, "presets.deep.budget_tokens is 5, less"),
    ],
)
def test_every_problem_names_its_place_and_what_would_work(policy: Any, message: str) -> None:
    assert message in _problem(policy)


def test_a_policy_and_settings_beside_it_must_agree() -> None:
    policy = {"settings": {"budget_tokens": 512}}
    raw = {"budget_tokens": 512, "sink_tokens": 64, "policy": policy}
    config = parse_config(TidalConfig, raw, "TIDAL_DECODE")
    assert (config.budget_tokens, config.sink_tokens) == (512, 64)
    with pytest.raises(PolicyError, match=r"is 512, but vllm_ext.budget_tokens is 256"):
        parse_config(TidalConfig, {"budget_tokens": 256, "policy": policy}, "TIDAL_DECODE")


def test_methods_without_policies_say_so() -> None:
    with pytest.raises(ConfigError, match=r"SINK_WINDOW takes no vllm_ext\.policy; `vllm-ext m"):
        parse_config(SinkWindowConfig, {"policy": {}}, "SINK_WINDOW")


def test_nothing_changes_nothing() -> None:
    assert _config() == TidalConfig() == TidalConfig(policy=NO_POLICY)
    assert compose(NO_POLICY, BASE, 32, 2).schedule == BASE
    same = _config(
        layers=[{"layers": [1, 4], "role": "anchor"}, {"layers": "2-3", "role": "reuse"}]
    )
    composed = compose(same.policy, BASE, 32, 2)
    assert composed.schedule == BASE
    assert composed.unmapped_layers == ()


def test_roles_head_maps_windows_and_retention_follow_the_policy() -> None:
    policy = _config(
        layers=[
            {"layers": 0, **WINDOW, "retention": "sink_window"},
            {"layers": [3], "role": "anchor"},
            {"layers": 4, **WINDOW},
        ]
    ).policy
    composed = compose(policy, BASE, 32, 2)
    assert composed.schedule.roles == (WINDOW_ROLE, ANCHOR, REUSE, ANCHOR, WINDOW_ROLE, REUSE)
    assert composed.schedule.spans == {0: (Span(8, 64),) * 2, 4: (Span(8, 64),) * 2}
    # Layer 2 still follows anchor 1; layer 5 follows 3 instead of 4.
    assert composed.schedule.head_maps == {2: (1, 0)}
    assert composed.unmapped_layers == (5,)
    keep = KeepAll(caches_generated=False)
    window = SpanRetention(Span(8, 64), caches_generated=False)
    assert retention_of(policy, (keep,) * 6) == (window, *(keep,) * 5)


def test_a_layer_that_was_no_reuse_layer_has_no_calibrated_map() -> None:
    policy = _config(layers=[{"layers": 4, "role": "reuse"}]).policy
    composed = compose(policy, BASE, 32, 2)
    assert composed.schedule.head_maps == {2: (1, 0), 3: (0, 0)}
    assert composed.unmapped_layers == (4, 5)
    without_maps = LayerSchedule(BASE.roles)
    assert compose(policy, without_maps, 32, 2).unmapped_layers == ()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"layers": "4-6", "role": "dense"}], "layers[0].layers has layer 6; this model has"),
        ([{"layers": 0, "role": "reuse"}], "layers[0].role is reuse, but no anchor is before"),
        (
            [{"layers": 0, "role": "dense"}, {"layers": 1, "role": "dense"}],
            "layers[1].role takes away the anchor 1 whose selection layer 2 reuses",
        ),
        ([{"layers": 2, **WINDOW}], "layers[0].window_tokens is 64, less than one KV block of 128"),
    ],
)
def test_what_the_model_cannot_do_is_an_error(layers: list[Any], message: str) -> None:
    with pytest.raises(PolicyError) as error:
        compose(_config(layers=layers).policy, BASE, 128, 2)
    assert message in str(error.value)


def test_the_warning_about_head_maps_names_the_layers(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.methods.test_tidal import _written

    settings = {"profile": str(_written(tmp_path))}
    layers = [{"layers": 3, "role": "anchor"}]
    config = _config(settings=settings, layers=layers)
    assert METHOD.schedule(config, GEOMETRY).roles[3] is LayerRole.SELF
    assert caplog.text == ""  # layers 4 and 5 are an anchor and its follower, as before
    config = _config(settings=settings, layers=[{"layers": 4, "role": "reuse"}])
    METHOD.schedule(config, GEOMETRY)
    METHOD.schedule(config, GEOMETRY)
    assert caplog.text.count("layers [4, 5] follow another anchor") == 1


LENGTHS = [1, 1000, 1001, 1024, 1500, 1501, 2000, 2047, 3000, 3001, 3999, 4000, 4001, 6000, 8192]
OPTIONS = [
    RowOptions(),
    RowOptions(budget_factor=0.5),
    RowOptions(budget_factor=2.0),
    RowOptions(budget_tokens=321),
    RowOptions(is_dense=True),
]
TIERS = [
    {"up_to_tokens": 1500, "budget_tokens": "all"},
    {"up_to_tokens": 3000, "budget_tokens": 777},
    {"up_to_tokens": 4000, "budget_tokens": 1600},
]


def _plain_budget_blocks(seq_len: int, asked: RowOptions, fraction: float) -> int:
    """The definition, on one row: 256 blocks of 32 tokens are the longest context."""
    if seq_len <= 1000 or asked.is_dense:
        return 256
    if asked.budget_tokens is not None:
        return -(-asked.budget_tokens // 32)
    tokens: float = 512
    for tier in TIERS:
        if seq_len <= tier["up_to_tokens"]:
            tokens = seq_len if tier["budget_tokens"] == "all" else tier["budget_tokens"]
            break
    blocks = max(-(-tokens // 32), -(-seq_len * fraction // 32))
    return min(256, max(3, int(-(-blocks * asked.budget_factor // 1))))


def _plan(config: Any, seq_lens: list[int], options: dict[int, RowOptions]) -> StepPlan:
    geometry = replace(GEOMETRY, max_num_reqs=len(seq_lens))
    schedule = METHOD.schedule(config, geometry)
    selector = METHOD.make_selector(config, schedule, geometry, torch.device("cpu"))
    return selector.plan(step_rows(seq_lens, options))


@pytest.mark.parametrize("fraction", [0.0, 0.25])
@pytest.mark.parametrize("asked", OPTIONS, ids=str)
def test_budgets_by_length_equal_a_plain_reading(asked: RowOptions, fraction: float) -> None:
    settings = {"min_context_tokens": 1000, "budget_fraction": fraction}
    config = _config(settings=settings, budgets=TIERS)
    options = {} if asked == RowOptions() else dict.fromkeys(range(len(LENGTHS)), asked)
    state = anchor_state(_plan(config, LENGTHS, options))
    expected = [_plain_budget_blocks(seq_len, asked, fraction) for seq_len in LENGTHS]
    assert state.budget_blocks.tolist() == expected


def test_rows_are_counted_by_what_they_read() -> None:
    def reasons(layers: list[Any]) -> Counter[tuple[str, str]]:
        config = _config(layers=layers, budgets=TIERS)
        return Counter(labels(_plan(config, [72, 73, 1024, 1500, 3000], {})))

    assert reasons([]) == {
        ("dense", "short_context"): 3,
        ("sparse", "everything_kept"): 1,
        ("sparse", "selected"): 1,
    }
    assert reasons([{"layers": 3, **WINDOW}]) == {
        ("dense", "short_context"): 1,
        ("sparse", "window_layers"): 3,
        ("sparse", "selected"): 1,
    }
    # Anchors leave out what they do not select, without any other layer, too.
    assert reasons([{"layers": "0-5", "role": "anchor"}]) == reasons([])
    # Where no layer reads a selection, no row is counted as if one did.
    assert reasons([{"layers": "0-5", "role": "dense"}]) == {
        ("dense", "short_context"): 3,
        ("dense", "no_sparse_layers"): 2,
    }


def test_presets_stand_beside_the_built_in_ones() -> None:
    presets = _config(presets={"deep": {"budget_tokens": 2048}, "half": {"factor": 0.5}}).presets
    assert presets == {
        "fast": RowOptions(budget_factor=0.5),
        "accurate": RowOptions(budget_factor=2.0),
        "deep": RowOptions(budget_tokens=2048),
        "half": RowOptions(budget_factor=0.5),
    }


def test_a_policy_read_twice_is_equal() -> None:
    raw = {"layers": [{"layers": "0-1", "role": "dense"}], "presets": {"x": {"factor": 2}}}
    assert parse_policy(raw, TidalConfig, ()) == parse_policy(raw, TidalConfig, ())
