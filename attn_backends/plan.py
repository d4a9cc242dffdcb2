"""What one step does: roles of the layers, and the plan made once per step.

A layer's plan is one of a few frozen records, each with just what it needs. Which ops a layer then
runs, on which buffers, follows from the records' types and the number of rows alone: lengths,
budgets and options are data in persistent buffers (docs/adr/0010), so that a graph captured for a
number of rows is right for every such batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import torch

from attn_backends.batch import BlockSelection, PagedBatch, RowCuts, SpanRule
from kvcache.spans import Span

if TYPE_CHECKING:
    from attn_backends.recall import RecallWatch
    from attn_backends.routed_prompts import RoutedPrompts


class LayerRole(Enum):
    """What a layer does with its decode rows; fixed per layer index, never by tensor values."""

    DENSE = "dense"
    """Reads every kept block."""
    SELECTED = "selected"
    """Reads a selection that was computed when the step was planned."""
    WINDOW = "window"
    """Reads what each KV head's span shows it (``LayerSchedule.spans``), in prefill too unless
    ``LayerSchedule.prompts_see_everything``."""
    ANCHOR = "anchor"
    """Reads everything and chooses blocks for the layers after it."""
    REUSE = "reuse"
    """Reads the last anchor's selection, through its head map."""
    SELF = "self"
    """Scores all keys, chooses from its own attention mass and attends only that. An anchor, too,
    for the layers after it; in every layer the top-k oracle, for evaluation."""
    DROP = "drop"
    """Attends nothing, in prefill as in decode: its output is zero, and no KV cache is allocated
    for it. What a dropped layer would have added is lost to every later layer."""


CHOOSING_ROLES = frozenset({LayerRole.ANCHOR, LayerRole.SELF})


@dataclass(frozen=True)
class LayerSchedule:
    """One role per attention layer, by layer index.

    Attributes:
        roles: the role of each layer.
        head_maps: for REUSE layers whose KV heads do not follow the anchor's head of the same
            index: the anchor's KV head that each KV head follows.
        spans: of the WINDOW layers, and of no others: what each KV head reads and keeps.
        query_spans: of those WINDOW layers whose query heads see less than their KV head's span:
            what each query head sees.
        prompts_see_everything: spans hold from a request's first answer token on; queries of its
            prompt see everything.
        routed_groups: WINDOW layers, each in one group, that a request's route may make full.

    Raises:
        ValueError: no layers, all of them dropped, a REUSE layer without an anchor before it,
            spans of other layers than the WINDOW ones, or a routed layer, or one with spans of
            query heads, that is none of them.
    """

    roles: tuple[LayerRole, ...]
    head_maps: dict[int, tuple[int, ...]] = field(default_factory=dict)
    spans: dict[int, tuple[Span, ...]] = field(default_factory=dict)
    query_spans: dict[int, tuple[Span, ...]] = field(default_factory=dict)
    prompts_see_everything: bool = False
    routed_groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.roles:
            raise ValueError("LayerSchedule.roles must name at least one layer")
        if len(self.dropped) == len(self.roles):
            raise ValueError("LayerSchedule.roles drops every layer; keep at least one")
        for layer, role in enumerate(self.roles):
            if role is LayerRole.REUSE and not CHOOSING_ROLES & set(self.roles[:layer]):
                raise ValueError(f"layer {layer} reuses a selection, but no anchor is before it")
        windows = set(self.of_role(LayerRole.WINDOW))
        if windows != set(self.spans):
            raise ValueError(
                f"LayerSchedule.spans has layers {sorted(self.spans)}, but the WINDOW layers are "
                f"{sorted(windows)}"
            )
        if other := {*()}.union(*self.routed_groups) - windows:
            raise ValueError(f"layers {sorted(other)} are routed, but are no WINDOW layers")
        if other := set(self.query_spans) - windows:
            raise ValueError(f"layers {sorted(other)} have query_spans, but are no WINDOW layers")

    def of_role(self, *roles: LayerRole) -> tuple[int, ...]:
        """Indices of the layers that have one of these roles."""
        return tuple(i for i, role in enumerate(self.roles) if role in roles)

    @property
    def rules(self) -> dict[int, tuple[Span, ...]]:
        """Of the WINDOW layers: what each KV head's queries see, or each query head's apart."""
        return self.spans | self.query_spans

    @property
    def dropped(self) -> tuple[int, ...]:
        """Indices of the DROP layers."""
        return self.of_role(LayerRole.DROP)

    @property
    def shares_selections(self) -> bool:
        """Whether layers read what others chose, or what other layers are evidence for."""
        return LayerRole.REUSE in self.roles or bool(self.routed_groups)

    @property
    def narrows_decode_only(self) -> bool:
        """Whether prefill reads everything that decode leaves out."""
        if self.prompts_see_everything:
            return True
        narrowing = {LayerRole.REUSE, LayerRole.SELF} & {*self.roles}
        return bool(narrowing) and LayerRole.WINDOW not in self.roles

    def with_narrow_anchors(self) -> LayerSchedule:
        """Anchors attend what they choose only: ANCHOR becomes SELF (docs/adr/0009)."""
        roles = (LayerRole.SELF if role is LayerRole.ANCHOR else role for role in self.roles)
        return replace(self, roles=tuple(roles))

    @classmethod
    def uniform(cls, role: LayerRole, num_layers: int) -> LayerSchedule:
        """The same role in every layer."""
        return cls((role,) * num_layers)


class RowReason(Enum):
    """Which way a decode row goes and why: the labels ``path`` and ``reason`` of the metric."""

    SELECTED = ("sparse", "selected")
    EVERYTHING_KEPT = ("sparse", "everything_kept")
    GUARD_RAISED = ("sparse", "guard_raised")
    WINDOW_LAYERS = ("sparse", "window_layers")
    UNKNOWN_LENGTH = ("sparse", "unknown_length")
    SHORT_CONTEXT = ("dense", "short_context")
    REQUEST_OFF = ("dense", "request_off")
    ROUTED_FULL = ("dense", "routed_full")
    GUARD = ("dense", "guard")
    NO_SPARSE_LAYERS = ("dense", "no_sparse_layers")

    @property
    def is_narrowed(self) -> bool:
        """Whether something is left out: recall is watched, rows are audited, and drafts pay."""
        return self in (RowReason.SELECTED, RowReason.GUARD_RAISED)


@dataclass(frozen=True)
class AnchorState:
    """What anchors write and choose by; views of persistent buffers, the same for all anchors."""

    block_mass: torch.Tensor  # [num_reqs, num_kv_heads, max_blocks] fp32
    budget_blocks: torch.Tensor  # [num_reqs] int32
    scored_lens: torch.Tensor  # [num_reqs] int32: tokens to score; 1 in rows that keep everything
    sink_blocks: int
    recent_blocks: int
    # [num_reqs, 3] fp32, least recall of each kind so far (recall.py); None where nobody reads it
    recall: torch.Tensor | None
    # [num_reqs] int32: blocks are chosen up to this length, beyond ``seq_lens`` where later queries
    # read the choice (drafting.py); None: up to ``seq_lens``
    chosen_lens: torch.Tensor | None = None


@dataclass(frozen=True)
class KeptRows:
    """A step in which rows may read what they chose in an earlier one (reselection.py)."""

    due: torch.Tensor | None  # [n] int64, rows that choose anew; None: none does
    slots: torch.Tensor  # [num_reqs] int64, of each decode row in the store
    store: BlockSelection  # this anchor's; a row per slot


@dataclass(frozen=True)
class Dense:
    """Decode rows read everything."""


@dataclass(frozen=True)
class Selected:
    """Decode rows read a selection that is there when the step begins."""

    selection: BlockSelection


@dataclass(frozen=True)
class Anchor:
    """Decode rows score all keys and choose."""

    selection: BlockSelection  # the anchor's before, then this one's
    state: AnchorState
    attends_everything: bool  # or what it chose
    inherits: bool  # another anchor is before it
    kept: KeptRows | None = None  # None: every row chooses anew


@dataclass(frozen=True)
class Checked:
    """Rows of which a reuse layer measures what it is given."""

    rows: torch.Tensor  # [n] int64
    recall: torch.Tensor  # of all rows, as ``AnchorState.recall``


@dataclass(frozen=True)
class Reuse:
    """Decode rows read the last anchor's selection."""

    selection: BlockSelection  # with the layer's head map, if it has one
    state: AnchorState
    checked: Checked | None = None


DecodeWay = Dense | Selected | Anchor | Reuse


class PrefillWitness(Protocol):
    """What a selector gives a layer whose prompts are evidence to it."""

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, batch: PagedBatch, scale: float
    ) -> None:
        """Sees the prefill rows of one step, keys of all their tokens in the cache; on GPUs, those
        of more than one token.

        Args:
            query: ``[num_tokens, num_heads, head_size]``.
            key_cache: ``[num_blocks, num_kv_heads, block_size, head_size]``.
            batch: the rows, in the batch's order behind its decode rows.
            scale: of the scores.
        """
        ...


@dataclass(frozen=True)
class LayerPlan:
    """What one layer does in one step.

    Attributes:
        decode: the way of the decode rows.
        rule: which tokens each row and KV head sees, prefill rows as well; None: all of them.
        witness: sees the prefill rows of a method that learns from prompts; None costs nothing.
        is_prefill_plain: this step's prefill rows see everything, whatever the rule.
    """

    decode: DecodeWay
    rule: SpanRule | None = None
    witness: PrefillWitness | None = None
    is_prefill_plain: bool = False

    def prefill_rule(self, num_decodes: int, num_prefills: int) -> SpanRule | None:
        """The rule of a step's prefill rows, which stand behind its decode rows."""
        if self.rule is None or self.is_prefill_plain:
            return None
        return self.rule.rows(num_decodes, num_decodes + num_prefills)


DENSE_LAYER = LayerPlan(Dense())


@dataclass(frozen=True)
class StepPlan:
    """What all layers do in one step.

    Attributes:
        layers: by layer index, all but the dropped ones.
        reasons: of the decode rows.
        watch: what is known of the anchors' choices, for metrics; None where nobody chooses.
        cuts: of the prefill rows, where rules count parts of them as rows.
        prompts: where requests are routed: what decides for those whose prompts this step ends.
    """

    layers: Mapping[int, LayerPlan]
    reasons: Sequence[RowReason]
    watch: RecallWatch | None = None
    cuts: RowCuts | None = None
    prompts: RoutedPrompts | None = None

    @property
    def narrowed_rows(self) -> list[int]:
        """Decode rows of which something is left out."""
        return [row for row, reason in enumerate(self.reasons) if reason.is_narrowed]


NO_LAYERS = StepPlan({}, ())


def reading_everything(plan: LayerPlan, row: int) -> LayerPlan:
    """The plan with a budget for everything in one row, for an audit of this step.

    Layers with a window keep it: what is outside may be freed. Nothing is kept or checked.
    """
    way = plan.decode
    if isinstance(way, Reuse):
        return replace(plan, decode=replace(way, checked=None))
    if not isinstance(way, Anchor):
        return plan
    budgets = way.state.budget_blocks.clone()
    budgets[row] = way.state.block_mass.shape[2]
    state = replace(way.state, budget_blocks=budgets)
    return replace(plan, decode=replace(way, state=state, kept=None))
