"""Friendly server flags, derived from the methods' settings.

``--window-tokens 512`` is the same as
``--additional-config '{"vllm_ext": {"window_tokens": 512}}'``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import Field
from typing import Any

import torch

from attn_backends.config import POLICY_KEY, Between, OneOf, rule_of, settings_of
from attn_backends.methods import REGISTRY, load_method
from vllm_ext.engine_process import DTYPES, cpu_dtype
from vllm_ext.errors import UserError

POLICY_FLAG = "--sparse-config"
_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "str": str,
    "float": float,
    "bool": lambda text: {"true": True, "false": False}[text],
}


def flag_of(setting: str) -> str:
    """The flag that gives a setting, or the policy."""
    return POLICY_FLAG if setting == POLICY_KEY else "--" + setting.replace("_", "-")


def setting_fields() -> dict[str, str]:
    """Type name of every setting that some method has, by its name."""
    return {
        setting: str(field.type)
        for name in REGISTRY
        for setting, field in settings_of(load_method(name).config_cls).items()
    }


def parse_setting(type_name: str, text: str) -> Any:
    """A setting's value from text.

    Raises:
        ValueError: it is not of the type.
    """
    try:
        return _PARSERS[type_name](text)
    except (KeyError, ValueError):
        raise ValueError(f"must be of type {type_name}, got {text!r}") from None


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per setting, grouped by the methods that have it; absent flags stay out of
    the namespace.
    """
    owners = _owners()
    # What most methods share comes first.
    for names in sorted(dict.fromkeys(owners.values()), key=len, reverse=True):
        group = parser.add_argument_group(_title(names))
        for setting in (setting for setting, of in owners.items() if of == names):
            _add_flag(group, setting, names)


def _owners() -> dict[str, tuple[str, ...]]:
    """The methods that have a setting, by its name."""
    owners: dict[str, tuple[str, ...]] = {}
    for name in REGISTRY:
        for setting in settings_of(load_method(name).config_cls):
            owners[setting] = (*owners.get(setting, ()), name)
    return owners


def _title(names: tuple[str, ...]) -> str:
    if len(names) == len(REGISTRY):
        return "settings of all methods (see `vllm-ext methods`)"
    *others, last = names
    return f"settings of {', '.join(others)} and {last}" if others else f"settings of {last}"


def _add_flag(group: Any, setting: str, names: tuple[str, ...]) -> None:
    fields = [settings_of(load_method(name).config_cls)[setting] for name in names]
    type_name, rule = str(fields[0].type), rule_of(fields[0])
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help_of(setting, names)}
    if type_name == "bool":
        options["action"] = argparse.BooleanOptionalAction
    else:
        options |= {"type": _PARSERS[type_name], "metavar": type_name.upper()}
    if isinstance(rule, OneOf):
        options |= {"choices": rule.choices, "metavar": None}
    group.add_argument(flag_of(setting), **options)


def _help_of(setting: str, names: tuple[str, ...]) -> str:
    """What the docstrings of the methods' settings say, with default and range."""
    said: dict[str, list[str]] = {}  # methods by text: two may mean different things by a name
    for name in names:
        config_cls = load_method(name).config_cls
        texts = (_documented(cls.__doc__ or "", setting) for cls in config_cls.__mro__)
        text = next(filter(None, texts), "")
        said.setdefault(f"{text} ({_limits(settings_of(config_cls)[setting])})", []).append(name)
    if len(said) == 1:
        return "".join(said).replace("%", "%%")
    return "; ".join(f"{', '.join(of)}: {text}" for text, of in said.items()).replace("%", "%%")


def _limits(setting: Field[Any]) -> str:
    """Default and range of a setting."""
    default: Any = setting.default
    if setting.type == "bool":
        default = "on" if default else "off"
    rule = rule_of(setting)
    shown = f"default {default}" if default != "" else "default empty"
    return f"{shown}, {rule}" if isinstance(rule, Between) else shown


def _documented(docstring: str, setting: str) -> str:
    """The text of ``setting`` in the Attributes section of a class docstring, or nothing."""
    found = re.search(rf"^    {setting}: (.*(?:\n {{8}}.*)*)", inspect.cleandoc(docstring), re.M)
    return re.sub(r"\s+", " ", found[1]).replace("``", "").rstrip(".") if found else ""


def add_dtype_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--dtype`` for commands that start engines of their own."""
    suited = "auto" if torch.cuda.is_available() else cpu_dtype()
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=suited,
        help=f"of weights and KV cache (here {suited}; bf16 is slow on CPUs without AVX-512)",
    )


def merge_additional_config(text: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The engine's additional config with our flags merged in.

    Args:
        text: what the user gave to ``--additional-config``, JSON.
        settings: flags of ours that were given, and the policy's content.

    Raises:
        UserError: not JSON, or a setting given twice with different values.
    """
    try:
        merged: Any = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"--additional-config is not JSON ({error}): {text!r:.200}") from None
    if not isinstance(merged, dict):
        raise UserError(f"--additional-config must be a JSON object, got {text!r}")
    if not settings:
        return merged
    ours = merged.setdefault("vllm_ext", {})
    if not isinstance(ours, dict):
        raise UserError(f"vllm_ext in --additional-config must be an object, got {ours!r}")
    for name, value in settings.items():
        if ours.get(name, value) != value:
            raise UserError(
                f"{name} is given twice: {flag_of(name)} {value!s:.200} and {ours[name]!r:.200} "
                "in --additional-config"
            )
        ours[name] = value
    return merged
