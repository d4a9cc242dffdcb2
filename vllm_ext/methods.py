"""The methods and their settings, for whatever starts engines and servers.

``deploy`` asks here: it imports no package below this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_backends.config import known_settings, parse_config
from attn_backends.methods import REGISTRY, load_method

__all__ = ["REGISTRY", "check_settings", "own_settings"]


def check_settings(method: str, settings: Mapping[str, Any]) -> None:
    """Refuses settings that the method would not honour.

    Args:
        method: a name of ``REGISTRY``.
        settings: what will stand under ``vllm_ext`` in the additional configuration.

    Raises:
        ConfigError: the message names the setting and what would work.
    """
    parse_config(load_method(method).config_cls, settings, method)


def own_settings(arm: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings given for several arms those that this one knows.

    Args:
        arm: a method's name; any other engine, stock vLLM say, knows none.
        settings: of all arms, by name.
    """
    if arm not in REGISTRY:
        return {}
    return known_settings(load_method(arm).config_cls, settings)
