"""Settings of methods that choose blocks within a budget, and what a request may say of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attn_backends.batch import RowOptions
from attn_backends.config import EngineFacts, SettingError, at_least, between
from attn_backends.lossless_config import LosslessConfig

ROW_OPTIONS = frozenset({"sparse", "budget_tokens"})
PRESETS = {  # what a request may name
    "fast": RowOptions(budget_factor=0.5),
    "accurate": RowOptions(budget_factor=2.0),
}


@dataclass(frozen=True)
class BudgetConfig(LosslessConfig):
    """Settings of methods that choose blocks within a budget.

    Attributes:
        budget_tokens: tokens that a KV head reads in a sparse layer, in whole KV blocks,
            forced blocks included.
        budget_fraction: share of the context that it reads instead where that is more.
        sink_tokens: first tokens that are always read.
        recent_tokens: last tokens that are always read; at least the current block is.
        min_context_tokens: rows up to this length are served dense, and counted so.
        recall_floor: a request of which a head in a reuse layer is given less than this share
            of what its own choice would cover gets twice its budget, then is served dense;
            0 guards nothing.
        guard_patience: checks in a row below the floor before that happens, twice.
        guard_interval_steps: decode steps between checks; each reads what a dense step reads.
        audit_share: share of the decode steps in which one row is computed densely as well, to
            measure the divergence.

    Raises:
        ConfigError: a value out of its range.
    """

    budget_tokens: int = at_least(1, "tokens", default=512)
    budget_fraction: float = between(0, 1, default=0.0)
    sink_tokens: int = at_least(0, "tokens", default=32)
    recent_tokens: int = at_least(0, "tokens", default=64)
    min_context_tokens: int = at_least(0, "tokens", default=1024)
    recall_floor: float = between(0, 1, default=0.0)
    guard_patience: int = at_least(1, "checks", default=1)
    guard_interval_steps: int = at_least(1, "steps", default=64)
    audit_share: float = between(0, 1, default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        forced_tokens = self.sink_tokens + self.recent_tokens
        if self.budget_tokens < forced_tokens:
            raise SettingError(
                "budget_tokens",
                f"is {self.budget_tokens}, less than sink_tokens + recent_tokens = "
                f"{forced_tokens}; raise the budget or lower those",
            )
        for field in ("recall_floor", "audit_share"):
            if getattr(self, field):
                self.refuse_with_drafts(field, "0")

    def check(self, engine: EngineFacts) -> None:
        """See ``MethodConfig.check``: guard and audit want one worker that tells which request a
        row is. Each worker of a tensor-parallel group sees its own heads: guards would decide
        differently, and every worker would count the audit's rows.
        """
        super().check(engine)
        for field in ("recall_floor", "audit_share"):
            value = getattr(self, field)
            if value and (engine.device_type != "cpu" or engine.num_workers > 1):
                raise SettingError(
                    field,
                    f"is {value}, but it works on CPUs with one worker per replica only (here: "
                    f"{engine.num_workers} on {engine.device_type}); set it to 0",
                )

    @property
    def presets(self) -> Mapping[str, RowOptions]:
        """See ``MethodConfig.presets``."""
        return PRESETS

    @property
    def least_budget_tokens(self) -> int:
        """See ``MethodConfig.least_budget_tokens``: what is read in any case."""
        return max(1, self.sink_tokens + self.recent_tokens)

    @property
    def audited_share(self) -> float:
        """See ``MethodConfig.audited_share``."""
        return self.audit_share
