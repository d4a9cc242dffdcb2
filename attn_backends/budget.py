"""Budgets of blocks per row and KV head, and the selector of methods that choose by mass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attn_backends.batch import BlockSelection, PagedBatch, RowOptions, SpanRule
from attn_backends.config import EngineFacts, MethodConfig, SettingError, at_least, between
from attn_backends.method import Geometry
from attn_backends.plan import AnchorState
from attn_backends.recall import RecallWatch
from attn_backends.reselection import SelectionKeeper
from kvcache.retention import KeepAll, RetentionPolicy

ROW_OPTIONS = frozenset({"sparse", "budget_tokens"})
PRESETS = {  # what a request may name
    "fast": RowOptions(budget_factor=0.5),
    "accurate": RowOptions(budget_factor=2.0),
}


@dataclass(frozen=True)
class BudgetConfig(MethodConfig):
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

    def check(self, engine: EngineFacts) -> None:
        """See ``MethodConfig.check``: guard and audit want one worker that tells which request a
        row is. Each worker of a tensor-parallel group sees its own heads: guards would decide
        differently, and every worker would count the audit's rows.
        """
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


class BudgetSelector:
    """Owns the selection that anchors fill and sparse layers read.

    Args:
        config: the budgets.
        geometry: of the layers.
        device: of the buffers.
    """

    keeper: SelectionKeeper | None = None  # methods may choose to keep selections

    def __init__(self, config: BudgetConfig, geometry: Geometry, device: torch.device) -> None:
        self._config = config
        self._block_size = block_size = geometry.block_size
        self._budget_blocks = -(-config.budget_tokens // block_size)
        self._sink_blocks = -(-config.sink_tokens // block_size)
        self._recent_blocks = -(-config.recent_tokens // block_size)
        self._max_blocks = -(-geometry.max_model_len // block_size)
        shape = (geometry.max_num_reqs, geometry.num_kv_heads, self._max_blocks)
        self._shape = shape
        self._blocks = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._counts = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        self._mass = torch.zeros(shape, dtype=torch.float32, device=device)
        self._budgets = torch.zeros(shape[0], dtype=torch.int32, device=device)
        self.watch = RecallWatch(
            config.recall_floor,
            config.guard_patience,
            config.guard_interval_steps,
            shape[0],
            device,
        )

    def select(self, batch: PagedBatch) -> BlockSelection:
        """See ``Selector.select``: the buffers that anchors will fill."""
        rows = batch.num_reqs
        return BlockSelection(self._blocks[:rows], self._counts[:rows])

    def anchor_state(
        self, batch: PagedBatch, options: Mapping[int, RowOptions]
    ) -> AnchorState | None:
        """See ``Selector.anchor_state``; short and dense rows get a budget for everything."""
        rows = batch.num_reqs
        budgets = self._budgets[:rows]
        budgets.copy_(self._budget_blocks_of(batch.seq_lens, options))
        return AnchorState(
            self._mass[:rows],
            budgets,
            self._sink_blocks,
            self._recent_blocks,
            self.watch.recall[:rows],
        )

    def _budget_blocks_of(
        self, seq_lens: torch.Tensor, options: Mapping[int, RowOptions]
    ) -> torch.Tensor:
        """Blocks that each row may read: what anchors are given, from lengths on the device, and
        what the row is counted as, from lengths on the host.

        Args:
            seq_lens: ``[num_reqs]`` int32.
            options: as for ``anchor_state``.

        Returns:
            ``[num_reqs]`` int32, where ``seq_lens`` is; no host synchronisation.
        """
        budgets = self._server_budget_blocks(seq_lens)
        if self._config.budget_fraction:
            share_tokens = seq_lens * self._config.budget_fraction
            share_blocks = torch.ceil(share_tokens / self._block_size).to(torch.int32)
            torch.maximum(budgets, share_blocks, out=budgets)
        for row, asked in options.items():
            if asked.is_dense:
                budgets[row] = self._max_blocks
            elif asked.budget_tokens is not None:
                budgets[row] = -(-asked.budget_tokens // self._block_size)
            else:
                scaled = torch.ceil(budgets[row] * asked.budget_factor).to(torch.int32)
                budgets[row] = scaled.clamp_min(self._sink_blocks + self._recent_blocks)
        is_short = seq_lens <= self._config.min_context_tokens
        return budgets.masked_fill_(is_short, self._max_blocks).clamp_max_(self._max_blocks)

    def _server_budget_blocks(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """The server's budget of each row, a new tensor."""
        return torch.full_like(seq_lens, self._budget_blocks, dtype=torch.int32)

    def span_rule(self, num_reqs: int) -> SpanRule | None:
        """See ``Selector.span_rule``: all tokens of a selected block count."""
        return None

    def row_reasons(
        self, seq_lens_cpu: torch.Tensor, options: Mapping[int, RowOptions]
    ) -> list[tuple[str, str]]:
        """See ``Selector.row_reasons``."""
        budget_tokens = self._budget_blocks_of(seq_lens_cpu, options) * self._block_size
        keeps_all = (budget_tokens >= seq_lens_cpu).tolist()
        return [
            self._reason(seq_len, keeps_all[row], options.get(row, RowOptions()))
            for row, seq_len in enumerate(seq_lens_cpu.tolist())
        ]

    def _reason(self, seq_len: int, keeps_all: bool, asked: RowOptions) -> tuple[str, str]:
        if asked.is_dense:
            return ("dense", "guard" if asked.is_guarded else "request_off")
        if seq_len <= self._config.min_context_tokens:
            return ("dense", "short_context")
        if keeps_all:
            return ("sparse", "everything_kept")
        return ("sparse", "guard_raised" if asked.is_guarded else "selected")


def prompts_cached(config: BudgetConfig, geometry: Geometry) -> tuple[RetentionPolicy, ...]:
    """Retention of methods with dense prefill and sparse decode: all is kept, but what was
    generated never serves a later prompt (it would have been computed densely).
    """
    return (KeepAll(caches_generated=False),) * geometry.num_layers
