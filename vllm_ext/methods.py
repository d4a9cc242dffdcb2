"""The methods and their settings, for whatever starts engines and servers.

``deploy`` asks here: it imports no package below this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_backends.adapter.speculation import speculative_arguments
from attn_backends.checkpoint import read_model_config
from attn_backends.config import known_settings, parse_config
from attn_backends.method import Geometry
from attn_backends.methods import REGISTRY, load_method
from attn_backends.profile import NoSectionError
from kvcache.retention import KeepAll

__all__ = ["REGISTRY", "check_settings", "frees_memory", "own_settings", "speculation"]


def speculation(method: str, settings: Mapping[str, Any], model: str) -> dict[str, Any] | None:
    """vLLM's ``speculative_config`` where a method's sparse rows only draft, else None.

    Args:
        method: a name of ``REGISTRY``.
        settings: see ``check_settings``.
        model: folder or hub name.

    Raises:
        ConfigError: see ``check_settings``.
    """
    config = parse_config(load_method(method).config_cls, settings, method)
    return speculative_arguments(model, config.draft_tokens) if config.draft_tokens else None


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


def frees_memory(method: str, settings: Mapping[str, Any], model: Path) -> bool:
    """Whether the method forgets a part of what this checkpoint caches; False, too, for one that
    needs a profile where nobody calibrated it.

    Args:
        method: a name of ``REGISTRY``.
        settings: as in ``own_settings``.
        model: folder with ``config.json``.

    Raises:
        ConfigError: a bad setting, a profile of another checkpoint's shape among them.
    """
    one = load_method(method)
    config = parse_config(one.config_cls, own_settings(method, settings), method)
    geometry = _geometry(model)
    try:
        schedule = one.schedule(config, geometry)
    except NoSectionError:
        return False
    entries = one.entries(config, schedule, geometry)
    return any(not isinstance(entry.policy, KeepAll) for entry in entries)


def _geometry(model: Path) -> Geometry:
    """As far as a checkpoint's own file tells it; blocks and rows are anybody's."""
    config = read_model_config(model)
    num_heads = config["num_attention_heads"]
    return Geometry(
        num_layers=config["num_hidden_layers"],
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        num_query_heads=num_heads,
        head_size=config.get("head_dim") or config["hidden_size"] // num_heads,
        block_size=32,
        max_num_reqs=1,
        max_model_len=config["max_position_embeddings"],
        model_path=str(model),
    )
