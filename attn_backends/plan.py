"""What one step does: roles of the layers, and the plan made once per batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

import torch

from attn_backends.batch import BlockSelection, PagedBatch, SpanRule


class LayerRole(Enum):
    """What a layer does with its decode rows; fixed per layer index, never by tensor values."""

    DENSE = "dense"
    """Reads every kept block through ``paged_attention``."""
    SELECTED = "selected"
    """Reads a selection that the builder computed, through ``sparse_decode``."""
    ANCHOR = "anchor"
    """Reads everything and selects blocks for the layers after it (``anchor_decode``)."""
    REUSE = "reuse"
    """Reads the last anchor's selection, through its head map."""
    SELF = "self"
    """Scores all keys, chooses from its own attention mass and attends only that. An anchor, too,
    for the layers after it; in every layer the top-k oracle, for evaluation."""
    DROP = "drop"
    """Attends nothing, in prefill as in decode: its output is zero, and no KV cache is allocated
    for it. What a dropped layer would have added is lost to every later layer."""


SELECTING_ROLES = frozenset({LayerRole.ANCHOR, LayerRole.SELF})


@dataclass(frozen=True)
class Window:
    """What a layer with a window of its own reads: the first and the last tokens, in prefill too.

    The query at position ``p`` sees token ``t <= p`` iff ``t < sink_tokens`` or
    ``t > p - window_tokens``.
    """

    sink_tokens: int
    window_tokens: int

    @property
    def reach_tokens(self) -> int:
        """Length up to which a context is read whole."""
        return self.sink_tokens + self.window_tokens


@dataclass(frozen=True)
class LayerSchedule:
    """One role per attention layer, by layer index.

    Attributes:
        roles: the role of each layer.
        head_maps: for REUSE layers whose KV heads do not follow the anchor's head of the same
            index: the anchor's KV head that each KV head follows.
        windows: of SELECTED layers whose selection is a window of their own, whatever the
            method selects for the others.

    Raises:
        ValueError: no layers, all of them dropped, or a REUSE layer without an anchor before it.
    """

    roles: tuple[LayerRole, ...]
    head_maps: dict[int, tuple[int, ...]] = field(default_factory=dict)
    windows: dict[int, Window] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.roles:
            raise ValueError("LayerSchedule.roles must name at least one layer")
        if len(self.dropped) == len(self.roles):
            raise ValueError("LayerSchedule.roles drops every layer; keep at least one")
        for layer, role in enumerate(self.roles):
            if role is LayerRole.REUSE and not SELECTING_ROLES & set(self.roles[:layer]):
                raise ValueError(f"layer {layer} reuses a selection, but no anchor is before it")

    @property
    def dropped(self) -> tuple[int, ...]:
        """Indices of the DROP layers."""
        return tuple(i for i, role in enumerate(self.roles) if role is LayerRole.DROP)

    def with_selecting_anchors(self) -> LayerSchedule:
        """Anchors attend what they select only: ANCHOR becomes SELF (docs/adr/0009)."""
        roles = (LayerRole.SELF if role is LayerRole.ANCHOR else role for role in self.roles)
        return replace(self, roles=tuple(roles))

    @classmethod
    def uniform(cls, role: LayerRole, num_layers: int) -> LayerSchedule:
        """The same role in every layer."""
        return cls((role,) * num_layers)


@dataclass(frozen=True)
class AnchorState:
    """What anchor layers need to fill the plan's selection; views of persistent buffers."""

    block_mass: torch.Tensor  # [num_reqs, num_kv_heads, max_blocks] fp32
    budget_blocks: torch.Tensor  # [num_reqs] int32
    sink_blocks: int
    recent_blocks: int
    recall: torch.Tensor  # [num_reqs, 3] fp32, least recall of each kind so far (recall.py)


@dataclass(frozen=True)
class RowSubset:
    """Some of the decode rows."""

    rows: torch.Tensor  # [n] int64
    batch: PagedBatch  # these rows alone

    @classmethod
    def of(cls, decode: PagedBatch, rows: list[int]) -> RowSubset | None:
        """Rows of ``decode`` by index; None for none of them."""
        if not rows:
            return None
        indices = torch.tensor(rows, device=decode.seq_lens.device)
        return cls(indices, decode.decode_rows(indices))


@dataclass(frozen=True)
class KeptRows:
    """A step in which rows may read what they selected in an earlier one (reselection.py)."""

    due: RowSubset | None  # rows that select anew
    slots: torch.Tensor  # [num_reqs] int64, of each decode row in the stores
    stores: dict[str, BlockSelection]  # by the anchor's layer name; a row per slot


@dataclass(frozen=True)
class DecodePlan:
    """Everything the layers of one step share.

    Decode rows (one query token) come first in the batch, prefill rows after them; each
    part is served by its own op, and none is sent dense because of the other.
    """

    num_tokens: int
    num_decode_tokens: int
    decode: PagedBatch | None
    prefill: PagedBatch | None
    selection: BlockSelection | None  # of the decode rows; written by anchors where there are any
    anchor: AnchorState | None
    decode_rule: SpanRule | None
    prefill_rule: SpanRule | None
    decodes_densely: bool  # no decode row is sparse: selecting would cost and change nothing
    roles: dict[str, LayerRole]  # by the engine's layer name
    head_maps: dict[str, torch.Tensor]  # of REUSE layers that need one: [num_kv_heads] int64
    inheriting: frozenset[str]  # anchors with another one before them
    selecting_rows: list[int]  # decode rows that leave something out
    checked: RowSubset | None  # rows whose REUSE layers measure their recall
    kept: KeptRows | None  # None: every row selects anew
