"""Budgets of blocks per row and KV head, and the selector of methods that choose by mass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attn_backends.batch import BlockSelection, PagedBatch, RowOptions, SpanRule
from attn_backends.config import ConfigError, MethodConfig
from attn_backends.method import Geometry
from attn_backends.plan import AnchorState
from attn_backends.recall import RecallWatch
from attn_backends.reselection import SelectionKeeper
from kvcache.retention import KeepAll, RetentionPolicy

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
        budget_fraction: share of the context that it reads where that is more; 0 to 1.
        sink_tokens: first tokens that are always read.
        recent_tokens: last tokens that are always read; at least the current block is.
        min_context_tokens: rows up to this length are served dense, and counted so.
        recall_floor: a request of which a head in a reuse layer is given less than this share
            of what its own choice would cover gets twice its budget, then is served dense
            (recall.py); 0 to 1, 0 guards nothing.
        guard_patience: checks in a row below the floor before that happens, twice.
        guard_interval_steps: decode steps between checks; each reads what a dense step reads.
        audit_share: share of the decode steps in which one row is computed densely as well, to
            measure the divergence (adapter/audit.py); 0 to 1.

    Raises:
        ConfigError: a value out of its range.
    """

    budget_tokens: int = 512
    budget_fraction: float = 0.0
    sink_tokens: int = 32
    recent_tokens: int = 64
    min_context_tokens: int = 1024
    recall_floor: float = 0.0
    guard_patience: int = 1
    guard_interval_steps: int = 64
    audit_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        lowest = {"budget_tokens": 1, "sink_tokens": 0, "recent_tokens": 0}
        for field, bound in (lowest | {"min_context_tokens": 0}).items():
            value = getattr(self, field)
            if not bound <= value <= 1 << 20:
                raise ConfigError(
                    f"vllm_ext.{field} is {value}; it must be between {bound} and {1 << 20} tokens"
                )
        for field in ("budget_fraction", "recall_floor", "audit_share"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(
                    f"vllm_ext.{field} is {getattr(self, field)}; it must be between 0 and 1"
                )
        for field in ("guard_patience", "guard_interval_steps"):
            if getattr(self, field) < 1:
                raise ConfigError(f"vllm_ext.{field} is {getattr(self, field)}; at least 1 works")
        forced_tokens = self.sink_tokens + self.recent_tokens
        if self.budget_tokens < forced_tokens:
            raise ConfigError(
                f"vllm_ext.budget_tokens is {self.budget_tokens}, less than sink_tokens + "
                f"recent_tokens = {forced_tokens}; raise the budget or lower those"
            )

    @property
    def presets(self) -> Mapping[str, RowOptions]:
        """What a request may name in ``vllm_xargs.sparse``, besides on and off."""
        return PRESETS


class BudgetSelector:
    """Owns the selection that anchors fill and sparse layers read.

    Args:
        config: the budgets.
        geometry: of the layers.
        device: of the buffers.
        parts: selections per KV head; its query heads are dealt out among them.
    """

    keeper: SelectionKeeper | None = None  # methods may choose to keep selections

    def __init__(
        self, config: BudgetConfig, geometry: Geometry, device: torch.device, parts: int = 1
    ) -> None:
        self._config = config
        self._block_size = block_size = geometry.block_size
        self._budget_blocks = -(-config.budget_tokens // block_size)
        self._sink_blocks = -(-config.sink_tokens // block_size)
        self._recent_blocks = -(-config.recent_tokens // block_size)
        self._max_blocks = -(-geometry.max_model_len // block_size)
        shape = (geometry.max_num_reqs, geometry.num_kv_heads, self._max_blocks)
        self._shape = shape
        chosen = (shape[0], parts * shape[1], shape[2])
        self._blocks = torch.full(chosen, -1, dtype=torch.int32, device=device)
        self._counts = torch.zeros(chosen[:2], dtype=torch.int32, device=device)
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
        self._fill_budgets(budgets, batch.seq_lens)
        if self._config.budget_fraction:
            share_tokens = batch.seq_lens * self._config.budget_fraction
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
        is_short = batch.seq_lens <= self._config.min_context_tokens
        budgets.masked_fill_(is_short, self._max_blocks)
        budgets.clamp_max_(self._max_blocks)
        return AnchorState(
            self._mass[:rows],
            budgets,
            self._sink_blocks,
            self._recent_blocks,
            self.watch.recall[:rows],
        )

    def _fill_budgets(self, budgets: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Writes the server's budget of each row, blocks; no host synchronisation."""
        budgets.fill_(self._budget_blocks)

    def _server_budget_tokens(self, seq_len: int) -> int:
        """The server's budget of a row of this length, on the host."""
        return self._config.budget_tokens

    def span_rule(self, num_reqs: int) -> SpanRule | None:
        """See ``Selector.span_rule``: all tokens of a selected block count."""
        return None

    def _keeps_everything(self, seq_len: int, asked: RowOptions) -> bool:
        """Whether the row's budget, worked out on the host, covers its context."""
        budget_tokens: float | None = asked.budget_tokens
        if budget_tokens is None:
            share_tokens = self._config.budget_fraction * seq_len
            server_tokens = max(self._server_budget_tokens(seq_len), share_tokens)
            budget_tokens = server_tokens * asked.budget_factor
        return seq_len <= math.ceil(budget_tokens / self._block_size) * self._block_size

    def row_reasons(
        self, seq_lens_cpu: torch.Tensor, options: Mapping[int, RowOptions]
    ) -> list[tuple[str, str]]:
        """See ``Selector.row_reasons``."""
        lengths = seq_lens_cpu.tolist()
        return [self._reason(n, options.get(row, RowOptions())) for row, n in enumerate(lengths)]

    def _reason(self, seq_len: int, asked: RowOptions) -> tuple[str, str]:
        if asked.is_dense:
            return ("dense", "guard" if asked.is_guarded else "request_off")
        if seq_len <= self._config.min_context_tokens:
            return ("dense", "short_context")
        if self._keeps_everything(seq_len, asked):
            return ("sparse", "everything_kept")
        return ("sparse", "guard_raised" if asked.is_guarded else "selected")


def prompts_cached(config: BudgetConfig, geometry: Geometry) -> tuple[RetentionPolicy, ...]:
    """Retention of methods with dense prefill and sparse decode: all is kept, but what was
    generated never serves a later prompt (it would have been computed densely).
    """
    return (KeepAll(caches_generated=False),) * geometry.num_layers
