"""Configuration of the attention side: one frozen dataclass per method, read strictly.

The engine carries our settings in ``--additional-config '{"vllm_ext": {...}}'``. Keys
that no method knows, wrong types and impossible values are errors that name the field,
the value and what would work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, TypeVar

KERNEL_CHOICES = ("auto", "cpu", "triton", "reference")
POLICY_KEY = "policy"  # of methods that take one: a field that composes others (docs/policy.md)


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

    @classmethod
    def compose(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the fields from what the user wrote; methods that take a policy read it here.

        Raises:
            ConfigError: the policy cannot be honoured.
        """
        return dict(raw)


C = TypeVar("C", bound=MethodConfig)
_TYPE_NAMES = {"int": int, "bool": bool, "str": str, "float": float}


def settings_of(config_cls: type[MethodConfig]) -> dict[str, Field[Any]]:
    """The fields that are plain settings, each a flag and a key under ``vllm_ext``."""
    return {field.name: field for field in fields(config_cls) if field.name != POLICY_KEY}


def takes_policy(config_cls: type[MethodConfig]) -> bool:
    """Whether the method can be composed by a policy."""
    return any(field.name == POLICY_KEY for field in fields(config_cls))


def type_problem(field: Field[Any], value: Any) -> str | None:
    """What is wrong with the type of a setting's value, or None."""
    type_name = str(field.type)
    if type(value) is _TYPE_NAMES[type_name]:
        return None
    return f"must be of type {type_name}, got {type(value).__name__}: {value!r}"


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
    known = settings_of(config_cls)
    if POLICY_KEY in raw and not takes_policy(config_cls):
        raise ConfigError(f"{method_name} takes no vllm_ext.policy; TIDAL_DECODE does")
    unknown = sorted(set(raw) - set(known) - {POLICY_KEY})
    if unknown:
        raise ConfigError(
            f"unknown vllm_ext setting {', '.join(repr(key) for key in unknown)} for "
            f"{method_name}; it knows: {', '.join(sorted(known))}"
        )
    for key, value in raw.items():
        if key in known and (problem := type_problem(known[key], value)):
            raise ConfigError(f"vllm_ext.{key} {problem}")
    return config_cls(**config_cls.compose(raw))


def known_settings(config_cls: type[MethodConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a method knows, for commands that run several methods at once."""
    names = settings_of(config_cls)
    return {key: value for key, value in settings.items() if key in names}
