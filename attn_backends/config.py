"""Configuration of the attention side: one frozen dataclass per method, read strictly.

The engine carries our settings in ``--additional-config '{"vllm_ext": {...}}'``. Keys
that no method knows, wrong types and impossible values are errors that name the field,
the value and what would work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

KERNEL_CHOICES = ("auto", "cpu", "triton", "reference")


class ConfigError(ValueError):
    """A setting of ours that cannot be honoured; the message says what would work."""


@dataclass(frozen=True)
class MethodConfig:
    """Settings every method has.

    Attributes:
        strict: refuse to start when anything would have to be served dense.
        kernel: implementation of the ops, ``auto`` or one of ``KERNEL_CHOICES``.
    """

    strict: bool = True
    kernel: str = "auto"

    def __post_init__(self) -> None:
        if self.kernel not in KERNEL_CHOICES:
            raise ConfigError(
                f"vllm_ext.kernel is {self.kernel!r}; choose one of {', '.join(KERNEL_CHOICES)}"
            )


C = TypeVar("C", bound=MethodConfig)
_TYPE_NAMES = {"int": int, "bool": bool, "str": str, "float": float}


def parse_config(config_cls: type[C], raw: Mapping[str, Any], method_name: str) -> C:
    """Builds a method's config from user-written settings.

    Args:
        config_cls: the method's frozen dataclass.
        raw: what stands under ``vllm_ext`` in ``--additional-config``.
        method_name: for the messages.

    Raises:
        ConfigError: unknown key, wrong type or impossible value.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"additional_config['vllm_ext'] must be an object of settings, "
            f"got {type(raw).__name__}: {raw!r}"
        )
    known = {field.name: field for field in fields(config_cls)}
    unknown = sorted(set(raw) - set(known))
    if unknown:
        raise ConfigError(
            f"unknown vllm_ext setting {', '.join(repr(key) for key in unknown)} for "
            f"{method_name}; it knows: {', '.join(sorted(known))}"
        )
    for key, value in raw.items():
        type_name = str(known[key].type)
        expected = _TYPE_NAMES[type_name]
        if type(value) is not expected:
            raise ConfigError(
                f"vllm_ext.{key} must be of type {type_name}, got {type(value).__name__}: {value!r}"
            )
    return config_cls(**raw)


def known_settings(config_cls: type[MethodConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a method knows, for commands that run several methods at once."""
    names = {field.name for field in fields(config_cls)}
    return {key: value for key, value in settings.items() if key in names}
