from __future__ import annotations

import pytest

from attn_backends.config import ConfigError, parse_config
from attn_backends.methods import REGISTRY, load_method
from attn_backends.methods.sink_window import SinkWindowConfig


@pytest.mark.parametrize("name", REGISTRY)
def test_every_method_has_defaults_and_says_what_it_does(name: str) -> None:
    method = load_method(name)
    assert method.name == name
    assert parse_config(method.config_cls, {}, name) == method.config_cls()
    capabilities = method.capabilities
    assert all((method.summary, method.paper, capabilities.reads, capabilities.frees))


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


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="SINK_WINDOW"):
        load_method("NOPE")
