"""Policies from files: YAML (or JSON, a subset) to plain data, with the line of every value.

The text is composed into nodes and never constructed: tags, aliases and everything that YAML
could run or expand are errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from attn_backends.config import ConfigError, read_text, takes_policy
from attn_backends.methods import methods_where
from attn_backends.policy import model
from vllm_ext.cli.flags import POLICY_FLAG
from vllm_ext.errors import UserError

MAX_POLICY_BYTES = 1 << 20
_TAG = "tag:yaml.org,2002:"
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}


@dataclass(frozen=True)
class PolicyFile:
    """A policy as written: valid YAML, its content not checked.

    Attributes:
        name: of the file, for messages.
        content: plain data as JSON has it.
        lines: 1-based, by path into the content.
    """

    name: str
    content: Any
    lines: Mapping[model.KeyPath, int]

    def line_of(self, path: model.KeyPath) -> int:
        """The line of a path, or of the nearest thing around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def located(self, error: model.PolicyError) -> UserError:
        """The error with the line that it is about."""
        where = f"{self.name}:{self.line_of(error.path)}"
        return UserError(f"{where}: {model.dotted(error.path)} {error.problem}")

    def require_agreement(self, given: Mapping[str, Any], shown: Callable[[str], str]) -> None:
        """Refuses settings that are given elsewhere with another value.

        Args:
            given: settings by name.
            shown: from a setting's name to how it is written there.

        Raises:
            UserError: names both places.
        """
        content = self.content if isinstance(self.content, dict) else {}
        own = content.get("settings")
        for name, value in (own if isinstance(own, dict) else {}).items():
            if name in given and given[name] != value:
                line = self.line_of(("settings", name))
                raise UserError(
                    f"{name} is given twice: {shown(name)} {given[name]} and settings.{name} "
                    f"{value} in {self.name}:{line}; drop one of them"
                )


def read_policy(argument: str) -> PolicyFile:
    """Reads the argument of ``--sparse-config``.

    Args:
        argument: the path of a file, or the policy itself where it starts with ``{``.

    Raises:
        UserError: unreadable, too large, not UTF-8, or not plain YAML; names file and line.
    """
    if argument.lstrip().startswith("{"):
        if len(argument) > MAX_POLICY_BYTES:
            raise UserError(f"{POLICY_FLAG} has more than {MAX_POLICY_BYTES} bytes")
        return _parsed(POLICY_FLAG, argument)
    try:
        path = Path(argument).expanduser()
        text = read_text(path, MAX_POLICY_BYTES, named=f"{POLICY_FLAG} {argument}")
    except (ConfigError, RuntimeError) as error:  # the latter: no such user's home
        raise UserError(str(error)) from None
    return _parsed(argument, text)


def methods_with_policy() -> list[str]:
    """The methods that a policy can compose."""
    return methods_where(lambda method: takes_policy(method.config_cls))


def require_method(backend: str) -> None:
    """Refuses a backend that takes no policy.

    Args:
        backend: the upper-case name, or an empty string.

    Raises:
        UserError: another method, a backend of vLLM, or none.
    """
    able = methods_with_policy()
    if backend not in able:
        chosen = f"is {backend}, which takes no policy" if backend else "is not given"
        raise UserError(
            f"{POLICY_FLAG} is given, but --attention-backend {chosen}; use {' or '.join(able)}"
        )


def _parsed(name: str, text: str) -> PolicyFile:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise UserError(f"{name}: is empty; see docs/policy.md")
        reader = _Reader(name)
        content = reader.value(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{name}:{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UserError(f"{name}: is nested too deeply for a policy") from None
    return PolicyFile(name, content, reader.lines)


class _Reader:
    """Plain values from YAML nodes, noting where each one stands."""

    def __init__(self, name: str) -> None:
        self.lines: dict[model.KeyPath, int] = {}
        self._name = name
        self._seen: set[int] = set()

    def value(self, node: Any, path: model.KeyPath) -> Any:
        """The node's value; an alias would bring the same node again."""
        if id(node) in self._seen:
            raise self._error(node, path, "is an alias; write it out")
        self._seen.add(id(node))
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        raise self._error(node, path, f"has the tag {node.tag}; policies are plain values")

    def _mapping(self, node: yaml.MappingNode, path: model.KeyPath) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag != _TAG + "str":
                hint = f"has the key {key_node.value!r:.40}, which YAML does not read as text; "
                raise self._error(key_node, path, hint + "put it in quotes")
            key = key_node.value
            if key in content:
                raise self._error(key_node, (*path, key), "is given twice")
            self.lines[*path, key] = key_node.start_mark.line + 1
            content[key] = self.value(value_node, (*path, key))
        return content

    def _scalar(self, node: yaml.ScalarNode, path: model.KeyPath) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind == "str":
            return text
        if kind == "int" and re.fullmatch(r"[-+]?(0|[1-9][0-9]{0,17})", text):
            return int(text)
        if kind == "float" and re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", text):
            number = float(text)
            if math.isfinite(number):
                return number
        if kind in ("bool", "null") and text.lower() in _WORDS:
            return _WORDS[text.lower()]
        raise self._error(
            node,
            path,
            f"is {text!r:.40}, which YAML reads as {kind.lstrip('!')}; write a plain number, true, "
            "false, or text in quotes",
        )

    def _error(self, node: Any, path: model.KeyPath, problem: str) -> UserError:
        line = node.start_mark.line + 1
        return UserError(f"{self._name}:{line}: {model.dotted(path)} {problem}")
