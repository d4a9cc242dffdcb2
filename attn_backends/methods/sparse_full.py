"""SPARSE_FULL: our decode path with every block selected.

Not a saving but a check: plan, selection, block tables and kernels are those of the
sparse methods, the answer must be stock vLLM's. Use it to tell a fault of this package
from a property of a method.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from attn_backends.batch import BlockSelection, PagedBatch, RowOptions, SpanRule
from attn_backends.config import MethodConfig
from attn_backends.method import Capabilities, Geometry, Purpose, SparseMethod
from attn_backends.plan import AnchorState, LayerRole, LayerSchedule
from attn_backends.recall import RecallWatch
from attn_backends.reselection import SelectionKeeper


class FullSelector:
    """Selects all blocks of every row."""

    watch: RecallWatch | None = None  # no anchors
    keeper: SelectionKeeper | None = None

    def __init__(self, config: MethodConfig, geometry: Geometry, device: torch.device) -> None:
        self._geometry = geometry
        max_blocks = -(-geometry.max_model_len // geometry.block_size)
        self._steps = torch.arange(max_blocks, dtype=torch.int32, device=device)
        shape = (geometry.max_num_reqs, geometry.num_kv_heads, max_blocks)
        self._blocks = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._counts = torch.zeros(shape[:2], dtype=torch.int32, device=device)

    def select(self, batch: PagedBatch) -> BlockSelection:
        """See ``Selector.select``."""
        block_size = self._geometry.block_size
        width = -(-batch.max_seq_len // block_size)
        counts = self._counts[: batch.num_reqs]
        counts.copy_(((batch.seq_lens + block_size - 1) // block_size)[:, None])
        steps = self._steps[:width]
        chosen = torch.where(steps < counts[:, :, None], steps, -1)
        blocks = self._blocks[: batch.num_reqs, :, :width]
        blocks.copy_(chosen)
        return BlockSelection(blocks, counts)

    def anchor_state(
        self, batch: PagedBatch, options: Mapping[int, RowOptions]
    ) -> AnchorState | None:
        """See ``Selector.anchor_state``: no anchors."""
        return None

    def span_rule(self, num_reqs: int) -> SpanRule | None:
        """See ``Selector.span_rule``: all tokens count."""
        return None

    def row_reasons(
        self, seq_lens_cpu: torch.Tensor, options: Mapping[int, RowOptions]
    ) -> list[tuple[str, str]]:
        """See ``Selector.row_reasons``."""
        return [("sparse", "everything_kept")] * len(seq_lens_cpu)


def _schedule(config: MethodConfig, geometry: Geometry) -> LayerSchedule:
    return LayerSchedule.uniform(LayerRole.SELECTED, geometry.num_layers)


METHOD = SparseMethod(
    name="SPARSE_FULL",
    summary="our path with everything kept, for checks",
    paper="none",
    config_cls=MethodConfig,
    schedule=_schedule,
    make_selector=FullSelector,
    capabilities=Capabilities(
        reads="all KV blocks",
        frees="nothing",
        limits="saves nothing by design; must equal stock vLLM",
    ),
    purpose=Purpose.CHECK,
)
