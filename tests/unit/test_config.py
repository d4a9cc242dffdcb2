from __future__ import annotations

import pickle
from dataclasses import Field
from typing import Any

import pytest

from attn_backends.config import (
    MAX_COUNT,
    Between,
    ConfigError,
    EngineFacts,
    OneOf,
    SettingError,
    known_settings,
    parse_config,
    rule_of,
    settings_of,
)
from attn_backends.methods import REGISTRY, load_method
from attn_backends.methods.sink_window import SinkWindowConfig
from attn_backends.methods.tidal_decode import TidalConfig

SETTINGS = [
    pytest.param(name, setting, id=f"{name}-{setting.name}")
    for name in REGISTRY
    for setting in settings_of(load_method(name).config_cls).values()
]


@pytest.mark.parametrize("name", REGISTRY)
def test_every_method_says_what_it_does(name: str) -> None:
    method = load_method(name)
    assert method.name == name
    capabilities = method.capabilities
    assert all((method.summary, method.paper, capabilities.reads, capabilities.frees))


def _values(setting: Field[Any]) -> tuple[Any, ...]:
    """What the setting may be, as far as its type and rule tell: both ends, or every word."""
    rule = rule_of(setting)
    if isinstance(rule, OneOf):
        return rule.choices
    if isinstance(rule, Between):
        return (rule.lowest, rule.highest)
    return {"bool": (True, False), "str": ("", "somewhere.json")}[str(setting.type)]


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_a_setting_changes_what_it_names_and_nothing_else(name: str, setting: Field[Any]) -> None:
    config_cls = load_method(name).config_cls
    # Budgets must fit, and so must drafts.
    roomy: dict[str, Any] = {"budget_tokens": MAX_COUNT, "sink_tokens": 0, "recent_tokens": 0}
    roomy["retention"] = "keep_all"
    others = known_settings(config_cls, roomy)
    before = vars(parse_config(config_cls, others, name))
    for value in _values(setting):
        after = vars(parse_config(config_cls, others | {setting.name: value}, name))
        assert after == before | {setting.name: value}


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_every_setting_refuses_what_lies_outside_its_rule(name: str, setting: Field[Any]) -> None:
    rule = rule_of(setting)
    if isinstance(rule, Between):
        wrong: list[Any] = [rule.lowest - 1, rule.highest + 1]
        if setting.type == "float":
            wrong += [float("nan"), float("inf"), -1e-9]
    elif isinstance(rule, OneOf):
        wrong = ["", rule.choices[0].upper()]
    else:
        assert setting.type in ("bool", "str"), "a number without a range"
        wrong = []
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"^vllm_ext\.{setting.name} is "):
            parse_config(load_method(name).config_cls, {setting.name: value}, name)


@pytest.mark.parametrize("field", ["recall_floor", "budget_fraction", "audit_share"])
def test_whole_numbers_are_numbers_and_booleans_are_not(field: str) -> None:
    for method in ("TIDAL_DECODE", "ORACLE_TOPK"):
        config_cls = load_method(method).config_cls
        assert getattr(parse_config(config_cls, {field: 0}, method), field) == 0
        assert getattr(parse_config(config_cls, {field: 1}, method), field) == 1
        for wrong in (True, False, "0", None):
            with pytest.raises(ConfigError, match=f"{field} must be of type float"):
                parse_config(config_cls, {field: wrong}, method)
    composed = parse_config(TidalConfig, {"policy": {"settings": {field: 0}}}, "TIDAL_DECODE")
    assert getattr(composed, field) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"windw_tokens": 5}, ["windw_tokens", "window_tokens"]),
        ({"window_tokens": -5}, ["window_tokens", "-5", "between 1 and"]),
        ({"sink_tokens": -1}, ["sink_tokens", "-1", "between 0 and"]),
        ({"window_tokens": "512"}, ["window_tokens", "int", "str", "'512'"]),
        ({"window_tokens": True}, ["window_tokens", "bool"]),
        ({"kernel": "gpu"}, ["kernel", "'gpu'", "reference"]),
        ({"strict": 1}, ["strict", "bool"]),
        ([], ["object", "list"]),
    ],
)
def test_bad_settings_name_field_value_and_remedy(settings: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(SinkWindowConfig, settings, "SINK_WINDOW")  # type: ignore[arg-type]
    for word in words:
        assert word in str(error.value)


def test_the_error_of_a_setting_survives_the_way_from_a_worker() -> None:
    error = SettingError("window_tokens", "is 5")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "vllm_ext.window_tokens is 5"


@pytest.mark.parametrize("name", REGISTRY)
def test_the_defaults_of_every_method_fit_every_engine(name: str) -> None:
    config = load_method(name).config_cls()
    for device_type in ("cpu", "cuda"):
        for block_size in (16, 32, 128):
            config.check(EngineFacts(device_type, block_size, num_workers=8))


@pytest.mark.parametrize(
    ("name", "settings", "engine", "message"),
    [
        (
            "SINK_WINDOW",
            {"window_tokens": 64},
            EngineFacts("cpu", 128, 1),
            "window_tokens is 64, less than one KV block of 128 tokens; use at least 128",
        ),
        *(
            (name, {field: 0.5}, engine, f"{field} is 0.5, but it works on CPUs with one worker")
            for name in ("TIDAL_DECODE", "ORACLE_TOPK")
            for field in ("recall_floor", "audit_share")
            for engine in (EngineFacts("cuda", 16, 1), EngineFacts("cpu", 32, 2))
        ),
    ],
)
def test_settings_that_would_not_do_what_they_say_are_refused(
    name: str, settings: dict[str, Any], engine: EngineFacts, message: str
) -> None:
    config = parse_config(load_method(name).config_cls, settings, name)
    config.check(EngineFacts("cpu", 32, 1))
    with pytest.raises(SettingError) as error:
        config.check(engine)
    assert str(error.value).startswith(f"vllm_ext.{message}")


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="SINK_WINDOW"):
        load_method("NOPE")
