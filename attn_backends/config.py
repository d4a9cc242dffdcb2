"""Configuration of the attention side: one frozen dataclass per method, read strictly.

The engine carries our settings in ``--additional-config '{"vllm_ext": {...}}'``. Keys
that no method knows, wrong types and impossible values are errors that name the field,
the value and what would work. Files that users name are read as strictly.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from attn_backends.batch import RowOptions

KERNEL_CHOICES = ("auto", "cpu", "triton", "reference")
POLICY_KEY = "policy"  # of methods that take one: a field that composes others (docs/policy.md)
MAX_COUNT = 1 << 20  # of tokens or steps: far above what any model is served with
_RULE = "rule"  # key of a field's metadata


class ConfigError(ValueError):
    """Something of ours that cannot be honoured; the message says what would work."""


class SettingError(ConfigError):
    """A setting that cannot be honoured.

    Attributes:
        field: its name, as under ``vllm_ext``.
        problem: what is wrong with it, and what would work.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)  # both, so that the error can be pickled
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        """The message of a setting that was given by itself."""
        return f"vllm_ext.{self.field} {self.problem}"


@dataclass(frozen=True)
class Between:
    """What a number may be, both ends included."""

    lowest: int
    highest: int
    unit: str = ""

    def __str__(self) -> str:
        """As the help shows it."""
        return f"{self.lowest} to {self.highest}"

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, or None; NaN lies nowhere."""
        if self.lowest <= value <= self.highest:
            return None
        bounds = f"between {self.lowest} and {self.highest} {self.unit}".rstrip()
        return f"is {value}; it must be {bounds}"


@dataclass(frozen=True)
class OneOf:
    """What a word may be."""

    choices: tuple[str, ...]

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""
        if value in self.choices:
            return None
        return f"is {value!r}; choose one of {', '.join(self.choices)}"


Rule = Between | OneOf
Number = TypeVar("Number", int, float)


def between(lowest: int, highest: int, *, default: Number, unit: str = "") -> Number:
    """A field of a ``MethodConfig``: its range is checked there and shown by ``--help``."""
    return field(default=default, metadata={_RULE: Between(lowest, highest, unit)})


def at_least(lowest: int, unit: str, *, default: int) -> int:
    """A field of a ``MethodConfig`` that counts something; every count has the same upper end."""
    return between(lowest, MAX_COUNT, default=default, unit=unit)


def one_of(choices: tuple[str, ...], *, default: str) -> str:
    """A field of a ``MethodConfig`` that takes one of a few words."""
    return field(default=default, metadata={_RULE: OneOf(choices)})


@dataclass(frozen=True)
class EngineFacts:
    """What settings must fit, besides one another.

    Attributes:
        device_type: ``cpu`` or ``cuda``.
        block_size: tokens per KV block.
        num_workers: of a replica.
    """

    device_type: str
    block_size: int
    num_workers: int


def block_problem(window_tokens: int, block_size: int) -> str | None:
    """What is wrong with a window that cannot hold one KV block, or None."""
    if window_tokens >= block_size:
        return None
    return (
        f"is {window_tokens}, less than one KV block of {block_size} tokens; use at least "
        f"{block_size}, or a smaller --block-size (32 is the smallest on CPU, 16 on GPU)"
    )


@dataclass(frozen=True)
class MethodConfig:
    """Settings every method has.

    Attributes:
        strict: refuse to start when anything would have to be served dense.
        kernel: implementation of the ops.

    Raises:
        SettingError: a value that its field's rule does not allow.
    """

    strict: bool = True
    kernel: str = one_of(KERNEL_CHOICES, default="auto")

    def __post_init__(self) -> None:
        for name, setting in settings_of(type(self)).items():
            rule = rule_of(setting)
            if rule is not None and (problem := rule.problem(getattr(self, name))):
                raise SettingError(name, problem)

    @classmethod
    def compose(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the fields from what the user wrote; methods that take a policy read it here.

        Raises:
            ConfigError: the policy cannot be honoured.
        """
        return dict(raw)

    def check(self, engine: EngineFacts) -> None:
        """Checks the settings against the engine: at start, and in each worker once more, since
        vLLM may choose the size of a KV block after it has loaded the model.

        Raises:
            SettingError: a setting that would not do there what it says.
        """

    @property
    def presets(self) -> Mapping[str, RowOptions]:
        """What a request may name in ``vllm_xargs.sparse``, besides on and off."""
        return {}

    @property
    def least_budget_tokens(self) -> int:
        """The smallest budget that a request may ask for."""
        return 1

    @property
    def audited_share(self) -> float:
        """Share of the decode steps in which one row is computed densely as well."""
        return 0.0

    @property
    def draft_tokens(self) -> int:
        """Tokens that a step drafts by sparse rows, for a dense pass to verify; 0: rows answer."""
        return 0


C = TypeVar("C", bound=MethodConfig)
_TYPE_NAMES = {"int": int, "bool": bool, "str": str, "float": float}


def settings_of(config_cls: type[MethodConfig]) -> dict[str, Field[Any]]:
    """The fields that are plain settings, each a flag and a key under ``vllm_ext``."""
    return {one.name: one for one in fields(config_cls) if one.name != POLICY_KEY}


def rule_of(setting: Field[Any]) -> Rule | None:
    """What the setting's value may be; None where its type says all."""
    rule: Rule | None = setting.metadata.get(_RULE)
    return rule


def takes_policy(config_cls: type[MethodConfig]) -> bool:
    """Whether the method can be composed by a policy."""
    return any(one.name == POLICY_KEY for one in fields(config_cls))


def type_problem(setting: Field[Any], value: Any) -> str | None:
    """What is wrong with the type of a setting's value, or None; 0 is a float as in Python."""
    type_name = str(setting.type)
    allowed = (int, float) if type_name == "float" else (_TYPE_NAMES[type_name],)
    if type(value) in allowed:  # and not isinstance: a bool is no number
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
        raise ConfigError(
            f"{method_name} takes no vllm_ext.policy; `vllm-ext methods` says which methods do"
        )
    unknown = sorted(set(raw) - set(known) - {POLICY_KEY})
    if unknown:
        raise ConfigError(
            f"unknown vllm_ext setting {', '.join(repr(key) for key in unknown)} for "
            f"{method_name}; it knows: {', '.join(sorted(known))}"
        )
    for key, value in raw.items():
        if key in known and (problem := type_problem(known[key], value)):
            raise SettingError(key, problem)
    return config_cls(**config_cls.compose(raw))


def known_settings(config_cls: type[MethodConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a method knows, for commands that run several methods at once."""
    names = settings_of(config_cls)
    return {key: value for key, value in settings.items() if key in names}


def read_text(path: Path, limit_bytes: int, named: str) -> str:
    """Text of a file that a user named.

    Raises:
        ConfigError: see ``read_bytes``; or not UTF-8.
    """
    try:
        return read_bytes(path, limit_bytes, named).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{named} is not UTF-8 text (byte {error.start})") from None


def read_bytes(path: Path, limit_bytes: int, named: str) -> bytes:
    """Content of a file that a user named, which may be anything.

    Args:
        path: of a regular file; a FIFO would block, a device has no end.
        limit_bytes: no more is read.
        named: what messages call it.

    Raises:
        ConfigError: not such a file, or larger than that.
    """
    try:
        # Without waiting for somebody to write to a FIFO.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(limit_bytes + 1) if is_regular else b""
    except OSError as error:
        raise ConfigError(f"{named} cannot be read: {error.strerror}") from None
    except ValueError as error:  # NUL or half a surrogate in the path
        raise ConfigError(f"{named!r} cannot be read: {error}") from None
    if not is_regular:
        raise ConfigError(f"{named} is not a regular file; write its content to one")
    if len(content) > limit_bytes:
        raise ConfigError(f"{named} has more than {limit_bytes} bytes; at most that many are read")
    return content
