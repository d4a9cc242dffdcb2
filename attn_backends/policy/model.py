"""What a policy says, as data that has been checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attn_backends.batch import RowOptions
from attn_backends.config import ConfigError
from attn_backends.plan import LayerRole
from kvcache.spans import Span

KeyPath = tuple[str | int, ...]  # keys and indices from the policy's root


def dotted(path: KeyPath) -> str:
    """A place in a policy as users write it: ``layers[1].role``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or "the policy"


class PolicyError(ConfigError):
    """A policy that cannot be honoured.

    Attributes:
        path: where; a front end that read the policy from a file can tell the line.
        problem: what is wrong there, and what would work.
    """

    def __init__(self, path: KeyPath, problem: str) -> None:
        super().__init__(path, problem)  # both, so that the error can be pickled
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        """The message where no line is known."""
        return f"vllm_ext.policy: {dotted(self.path)} {self.problem}"


@dataclass(frozen=True)
class LayerRule:
    """What some layers do instead of what the profile says.

    Attributes:
        layers: 0-based, ascending.
        role: DENSE, ANCHOR or REUSE; WINDOW for layers with a window.
        span: what layers with a window see of the past, else None.
        frees: whether the blocks outside it are freed.
    """

    layers: tuple[int, ...]
    role: LayerRole
    span: Span | None = None
    frees: bool = False


@dataclass(frozen=True)
class ContextBudget:
    """The budget of rows up to a length.

    Attributes:
        up_to_tokens: the longest context it applies to.
        budget_tokens: as the setting of that name; None: everything is read.
    """

    up_to_tokens: int
    budget_tokens: int | None


@dataclass(frozen=True)
class Policy:
    """The whole document; the empty one changes nothing.

    Attributes:
        settings: of the method, by name.
        layers: none has a layer that another one has.
        budgets: ascending by length; longer rows have the setting ``budget_tokens``.
        presets: by the name that a request gives, without the built-in ones.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[LayerRule, ...] = ()
    budgets: tuple[ContextBudget, ...] = ()
    presets: Mapping[str, RowOptions] = field(default_factory=dict)

    @property
    def spans(self) -> tuple[Span, ...]:
        """What layers with a window see."""
        return tuple(rule.span for rule in self.layers if rule.span is not None)

    def budget_of(self, seq_len: int) -> ContextBudget | None:
        """The entry of ``budgets`` for a context of this many tokens, or None."""
        return next((entry for entry in self.budgets if seq_len <= entry.up_to_tokens), None)

    def require_budgets(self, forced_tokens: int, min_context_tokens: int) -> None:
        """Checks budgets against settings that may come from elsewhere.

        Args:
            forced_tokens: what is read in any case; no budget may be less.
            min_context_tokens: rows up to this length are dense, no budget applies to them.

        Raises:
            PolicyError: a budget that is too small, or would never apply.
        """
        forced = f"less than sink_tokens + recent_tokens = {forced_tokens}"
        for index, entry in enumerate(self.budgets):
            if entry.budget_tokens is not None and entry.budget_tokens < forced_tokens:
                path: KeyPath = ("budgets", index, "budget_tokens")
                raise PolicyError(path, f"is {entry.budget_tokens}, {forced}")
            if entry.up_to_tokens <= min_context_tokens:
                raise PolicyError(
                    ("budgets", index, "up_to_tokens"),
                    f"is {entry.up_to_tokens}, but rows up to min_context_tokens = "
                    f"{min_context_tokens} are served dense; lower that, or drop this entry",
                )
        for name, options in self.presets.items():
            if options.budget_tokens is not None and options.budget_tokens < forced_tokens:
                path = ("presets", name, "budget_tokens")
                raise PolicyError(path, f"is {options.budget_tokens}, {forced}")


NO_POLICY = Policy()
