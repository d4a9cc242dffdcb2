"""What one step does: roles of the layers, and the plan made once per batch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from attn_backends.batch import BlockSelection, PagedBatch, SpanRule


class LayerRole(Enum):
    """What a layer does with its decode rows; fixed per layer index, never by tensor values."""

    DENSE = "dense"
    """Reads every kept block through ``paged_attention``."""
    SELECTED = "selected"
    """Reads the plan's selection through ``sparse_decode``."""


@dataclass(frozen=True)
class LayerSchedule:
    """One role per attention layer, by layer index.

    Raises:
        ValueError: no layers.
    """

    roles: tuple[LayerRole, ...]

    def __post_init__(self) -> None:
        if not self.roles:
            raise ValueError("LayerSchedule.roles must name at least one layer")

    @classmethod
    def uniform(cls, role: LayerRole, num_layers: int) -> LayerSchedule:
        """The same role in every layer."""
        return cls((role,) * num_layers)


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
    selection: BlockSelection | None  # of the decode rows
    decode_rule: SpanRule | None
    prefill_rule: SpanRule | None
    roles: dict[str, LayerRole]  # by the engine's layer name
