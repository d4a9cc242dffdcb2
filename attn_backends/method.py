"""What a sparse-decode method is: a config, a schedule, a selection, and honest limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from attn_backends.batch import BlockSelection, PagedBatch, RowOptions, SpanRule
from attn_backends.config import MethodConfig
from attn_backends.plan import AnchorState, LayerSchedule
from attn_backends.profile import ProfileSection
from attn_backends.recall import RecallWatch
from attn_backends.reselection import SelectionKeeper
from kvcache.retention import KeepAll, RetentionPolicy

# What ``Selector.row_reasons`` says of rows that leave something out of what they read: their
# recall is watched and they are audited.
SELECTING = (("sparse", "selected"), ("sparse", "guard_raised"))


@dataclass(frozen=True)
class Geometry:
    """What a selector must know about the layers it serves."""

    num_layers: int
    num_kv_heads: int
    num_query_heads: int
    head_size: int
    block_size: int
    max_num_reqs: int
    max_model_len: int
    model_path: str = ""  # folder or hub name, for finding a shipped profile


class Selector(Protocol):
    """Chooses the blocks that decode rows read; owns persistent buffers."""

    @property
    def watch(self) -> RecallWatch | None:
        """What anchors find out about their selections; None for methods without anchors."""
        ...

    @property
    def keeper(self) -> SelectionKeeper | None:
        """What rows selected in earlier steps; None where every step selects anew."""
        ...

    def select(self, batch: PagedBatch) -> BlockSelection:
        """Selection for decode rows, once per step, without host synchronisation.

        The returned tensors are views of persistent buffers, valid until the next call. Where
        ``anchor_state`` gives one, anchor layers fill them, and their content is undefined
        until the first anchor has run.
        """
        ...

    def anchor_state(
        self, batch: PagedBatch, options: Mapping[int, RowOptions]
    ) -> AnchorState | None:
        """What anchor layers need, or None for methods without anchors.

        Args:
            batch: the decode rows.
            options: by row index, for rows whose request asked for something itself.
        """
        ...

    def span_rule(self, num_reqs: int) -> SpanRule | None:
        """Token rule for ``num_reqs`` rows, or None where all tokens of a block count."""
        ...

    def row_reasons(
        self, seq_lens_cpu: torch.Tensor, options: Mapping[int, RowOptions]
    ) -> list[tuple[str, str]]:
        """Which way each decode row goes: (path, reason), the labels of the metric. Rows that
        leave something out have one of ``SELECTING``.

        Args:
            seq_lens_cpu: ``[num_reqs]`` on the host.
            options: as for ``anchor_state``.
        """
        ...


@dataclass(frozen=True)
class Capabilities:
    """What users must know before they choose the method (``vllm-ext methods``)."""

    reads: str
    frees: str
    limits: str


def _keep_all(config: MethodConfig, geometry: Geometry) -> tuple[RetentionPolicy, ...]:
    return (KeepAll(),) * geometry.num_layers


@dataclass(frozen=True)
class SparseMethod:
    """One entry of the registry: everything the product knows about a method.

    Attributes:
        name: the value of ``--attention-backend``.
        summary: one line for tables.
        paper: source.
        config_cls: frozen dataclass of the method's settings.
        schedule: ``(config, geometry) -> LayerSchedule``.
        make_selector: ``(config, geometry, device) -> Selector``.
        capabilities: what it reads and frees, and where it does not work.
        row_options: what a request may ask for itself, names under ``vllm_xargs``: ``sparse`` (on,
            off or a preset) and ``budget_tokens``.
        retention: ``(config, geometry) -> `` the policy of each layer; default: all is kept.
        profile_section: what the method reads of a profile; None: it reads none.
    """

    name: str
    summary: str
    paper: str
    config_cls: type[MethodConfig]
    schedule: Callable[..., LayerSchedule]
    make_selector: Callable[..., Selector]
    capabilities: Capabilities
    row_options: frozenset[str] = frozenset()
    retention: Callable[..., tuple[RetentionPolicy, ...]] = _keep_all
    profile_section: type[ProfileSection] | None = None
