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
from typing import Any

from attn_backends.config import KERNEL_CHOICES, POLICY_KEY, settings_of
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
    """Adds one flag per setting; absent flags stay out of the namespace."""
    group = parser.add_argument_group("vllm-ext settings (see `vllm-ext methods`)")
    for name, type_name in setting_fields().items():
        flag = flag_of(name)
        text = _help_of(name)
        if type_name == "bool":
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
            continue
        choices = KERNEL_CHOICES if name == "kernel" else None
        group.add_argument(
            flag,
            type=_PARSERS[type_name],
            default=argparse.SUPPRESS,
            choices=choices,
            metavar=None if choices else type_name.upper(),
            help=text,
        )


def _help_of(setting: str) -> str:
    """What the docstrings of the methods' settings say, and whose setting it is."""
    owners: dict[str, list[str]] = {}  # methods by text: two may mean different things by a name
    for name in REGISTRY:
        config_cls = load_method(name).config_cls
        if setting in settings_of(config_cls):
            texts = [
                found
                for cls in config_cls.__mro__
                if (found := _documented(cls.__doc__ or "", setting))
            ]
            owners.setdefault(texts[0] if texts else "", []).append(name)
    parts = [
        f"{text} ({'all methods' if len(names) == len(REGISTRY) else ', '.join(names)})".strip()
        for text, names in owners.items()
    ]
    return "; ".join(parts).replace("%", "%%")


def _documented(docstring: str, setting: str) -> str:
    """The text of ``setting`` in the Attributes section of a class docstring, or nothing."""
    found = re.search(rf"^    {setting}: (.*(?:\n {{8}}.*)*)", inspect.cleandoc(docstring), re.M)
    return re.sub(r"\s+", " ", found[1]).replace("``", "").rstrip(".") if found else ""


def add_dtype_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--dtype`` for commands that start engines of their own."""
    suited = cpu_dtype()
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
    except json.JSONDecodeError as error:
        raise UserError(f"--additional-config is not JSON ({error}): {text!r}") from None
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
