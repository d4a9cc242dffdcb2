"""From what a user wrote to a ``Policy``: strict, and every error names its place.

The input is plain data as JSON has it; files, formats and line numbers are a front end's
business (vllm_ext/cli/policy_file.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from attn_backends.batch import RowOptions
from attn_backends.config import MethodConfig, SettingError, settings_of, type_problem
from attn_backends.plan import LayerRole
from attn_backends.policy.model import ContextBudget, KeyPath, LayerRule, Policy, PolicyError
from kvcache.spans import Span

SECTIONS = ("settings", "layers", "budgets", "presets")
ROLES = {
    "dense": LayerRole.DENSE,
    "anchor": LayerRole.ANCHOR,
    "reuse": LayerRole.REUSE,
    "window": LayerRole.WINDOW,
}
RETENTIONS = ("all", "sink_window")
MAX_LAYERS = 1024
MAX_TOKENS = 1 << 20
MAX_FACTOR = 1024
EVERYTHING = "all"  # as a budget


def parse_policy(
    raw: Any, config_cls: type[MethodConfig], reserved_presets: Iterable[str]
) -> Policy:
    """Reads and checks a policy; what needs the model is checked by ``composition``.

    Args:
        raw: what stands under ``vllm_ext.policy``.
        config_cls: of the method, whose settings the policy may set.
        reserved_presets: names that requests know already.

    Raises:
        PolicyError: the first problem, its place, and what would work.
    """
    document = _object(raw, (), SECTIONS)
    layers = _items(document.get("layers", []), ("layers",))
    budgets = _items(document.get("budgets", []), ("budgets",))
    policy = Policy(
        _settings(document.get("settings", {}), config_cls),
        tuple(_layer_rule(item, path) for path, item in layers),
        tuple(_context_budget(item, path) for path, item in budgets),
        _presets(document.get("presets", {}), frozenset(reserved_presets)),
    )
    _require_disjoint(policy.layers)
    _require_ascending(policy.budgets)
    return policy


def _object(raw: Any, path: KeyPath, known: Iterable[str]) -> Mapping[str, Any]:
    known = tuple(known)
    if not isinstance(raw, Mapping):
        raise PolicyError(path, f"must be an object of {', '.join(known)}, got {raw!r:.80}")
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise PolicyError((*path, str(key)), f"is not known; {hint}")
    return raw


def _items(raw: Any, path: KeyPath) -> list[tuple[KeyPath, Any]]:
    if not isinstance(raw, list):
        raise PolicyError(path, f"must be a list, got {raw!r:.80}")
    return [((*path, index), item) for index, item in enumerate(raw)]


def _required(raw: Mapping[str, Any], key: str, path: KeyPath) -> Any:
    if key not in raw:
        raise PolicyError(path, f"has no {key}")
    return raw[key]


def _tokens(value: Any, path: KeyPath, lowest: int, other: str = "") -> int:
    if type(value) is not int or not lowest <= value <= MAX_TOKENS:
        raise PolicyError(
            path, f"is {value!r:.80}; it must be {lowest} to {MAX_TOKENS} tokens{other}"
        )
    return value


def _settings(raw: Any, config_cls: type[MethodConfig]) -> dict[str, Any]:
    known = settings_of(config_cls)
    settings = dict(_object(raw, ("settings",), known))
    for key, value in settings.items():
        if problem := type_problem(known[key], value):
            raise PolicyError(("settings", key), problem)
    try:
        config_cls(**settings)
    except SettingError as error:
        if error.field in settings:
            raise PolicyError(("settings", error.field), error.problem) from None
        raise PolicyError(("settings",), f"do not fit together: {error}") from None
    return settings


def _layer_rule(raw: Any, path: KeyPath) -> LayerRule:
    entry = _object(raw, path, ("layers", "role", "retention", "sink_tokens", "window_tokens"))
    layers = _layers(_required(entry, "layers", path), (*path, "layers"))
    role = _required(entry, "role", path)
    if not isinstance(role, str) or role not in ROLES:
        raise PolicyError((*path, "role"), f"is {role!r:.80}; choose one of {', '.join(ROLES)}")
    retention = entry.get("retention", "all")
    if retention not in RETENTIONS:
        raise PolicyError(
            (*path, "retention"), f"is {retention!r:.80}; choose one of {', '.join(RETENTIONS)}"
        )
    if role == "window":
        sinks = _tokens(_required(entry, "sink_tokens", path), (*path, "sink_tokens"), 0)
        last = _tokens(_required(entry, "window_tokens", path), (*path, "window_tokens"), 1)
        return LayerRule(layers, ROLES[role], Span(sinks, last), frees=retention == "sink_window")
    if retention == "sink_window":
        raise PolicyError(
            (*path, "retention"),
            f"is 'sink_window', but the role is {role}: such a layer would read what is freed; "
            "use role window, or retention all",
        )
    for key in ("sink_tokens", "window_tokens"):
        if key in entry:
            raise PolicyError((*path, key), f"is of role window only, and the role is {role}")
    return LayerRule(layers, ROLES[role])


def _layers(raw: Any, path: KeyPath) -> tuple[int, ...]:
    """Layer numbers from ``5``, ``"0-3"`` or ``[1, 2]``."""
    ranges: list[tuple[int, int]] = []
    for item in raw if isinstance(raw, list) else [raw]:
        match = re.fullmatch(r"(\d{1,4})-(\d{1,4})", item) if isinstance(item, str) else None
        if match is not None:
            ranges.append((int(match[1]), int(match[2])))
        elif type(item) is int:
            ranges.append((item, item))
        else:
            raise PolicyError(path, f'is {raw!r:.80}; write 5, "0-3" or [1, 2]')
    for first, last in ranges:
        if not 0 <= first <= last < MAX_LAYERS:
            raise PolicyError(
                path, f"is {raw!r:.80}; layers ascend, from 0 to at most {MAX_LAYERS - 1}"
            )
    layers = [layer for first, last in ranges for layer in range(first, last + 1)]
    if not layers or len(set(layers)) < len(layers):
        raise PolicyError(path, f"is {raw!r:.80}; name at least one layer, and each once")
    return tuple(sorted(layers))


def _context_budget(raw: Any, path: KeyPath) -> ContextBudget:
    entry = _object(raw, path, ("up_to_tokens", "budget_tokens"))
    up_to = _tokens(_required(entry, "up_to_tokens", path), (*path, "up_to_tokens"), 1)
    budget = _required(entry, "budget_tokens", path)
    if budget == EVERYTHING:
        return ContextBudget(up_to, None)
    return ContextBudget(up_to, _tokens(budget, (*path, "budget_tokens"), 1, f", or {EVERYTHING}"))


def _presets(raw: Any, reserved: frozenset[str]) -> dict[str, RowOptions]:
    if not isinstance(raw, Mapping):
        raise PolicyError(("presets",), f"must be an object of presets by name, got {raw!r:.80}")
    return {name: _preset(name, value, reserved) for name, value in raw.items()}


def _preset(name: Any, raw: Any, reserved: frozenset[str]) -> RowOptions:
    path: KeyPath = ("presets", str(name))
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name):
        raise PolicyError(
            path, "is no name for a preset; use up to 32 of a-z, 0-9, - and _, a letter first"
        )
    if name in reserved:
        raise PolicyError(path, "is built in; choose another name")
    entry = _object(raw, path, ("budget_tokens", "factor"))
    if len(entry) != 1:
        raise PolicyError(path, "must have budget_tokens or factor, one of them")
    if "budget_tokens" in entry:
        budget = _tokens(entry["budget_tokens"], (*path, "budget_tokens"), 1)
        return RowOptions(budget_tokens=budget)
    factor = entry["factor"]
    if type(factor) not in (int, float) or not 0 < factor <= MAX_FACTOR:
        raise PolicyError(
            (*path, "factor"),
            f"is {factor!r:.80}; it must be a number above 0, at most {MAX_FACTOR}",
        )
    return RowOptions(budget_factor=float(factor))


def _require_disjoint(rules: tuple[LayerRule, ...]) -> None:
    owner: dict[int, int] = {}
    for index, rule in enumerate(rules):
        for layer in rule.layers:
            if layer in owner:
                raise PolicyError(
                    ("layers", index, "layers"),
                    f"has layer {layer}, which layers[{owner[layer]}] has too; give it one role",
                )
            owner[layer] = index


def _require_ascending(budgets: tuple[ContextBudget, ...]) -> None:
    for index in range(1, len(budgets)):
        before, here = budgets[index - 1].up_to_tokens, budgets[index].up_to_tokens
        if here <= before:
            raise PolicyError(
                ("budgets", index, "up_to_tokens"),
                f"is {here}, not above the {before} before it; sort the list by up_to_tokens",
            )
