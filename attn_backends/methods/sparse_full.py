"""SPARSE_FULL: our decode path with every block selected.

Not a saving but a check: plan, selection, block tables and kernels are those of the
sparse methods, the answer must be stock vLLM's. Use it to tell a fault of this package
from a property of a method.
"""

from __future__ import annotations

import torch

from attn_backends.batch import BlockSelection
from attn_backends.config import MethodConfig
from attn_backends.method import Capabilities, Geometry, Purpose, SparseMethod, StepRows
from attn_backends.plan import LayerPlan, LayerRole, LayerSchedule, RowReason, Selected, StepPlan


class FullSelector:
    """Selects all blocks of every row.

    Args:
        schedule: of SELECTED layers.
        geometry: of the layers.
        device: of the buffers.
    """

    def __init__(self, schedule: LayerSchedule, geometry: Geometry, device: torch.device) -> None:
        self._block_size, self._num_layers = geometry.block_size, len(schedule.roles)
        max_blocks = -(-geometry.max_model_len // geometry.block_size)
        self._steps = torch.arange(max_blocks, dtype=torch.int32, device=device)
        shape = (geometry.max_num_reqs, geometry.num_kv_heads, max_blocks)
        self._selection = BlockSelection.empty(shape, device)

    def plan(self, rows: StepRows) -> StepPlan:
        """See ``Selector.plan``."""
        selection = self._selection.rows(0, rows.num_decodes)
        num_blocks = (rows.seq_lens + self._block_size - 1) // self._block_size
        selection.counts.copy_(num_blocks[:, None])
        is_past = self._steps >= selection.counts[:, :, None]
        selection.logical_blocks.copy_(self._steps.expand_as(is_past).masked_fill(is_past, -1))
        plan = LayerPlan(Selected(selection))
        layers = dict.fromkeys(range(self._num_layers), plan)
        return StepPlan(layers, [RowReason.EVERYTHING_KEPT] * rows.num_decodes)


def _schedule(config: MethodConfig, geometry: Geometry) -> LayerSchedule:
    return LayerSchedule.uniform(LayerRole.SELECTED, geometry.num_layers)


def _selector(
    config: MethodConfig, schedule: LayerSchedule, geometry: Geometry, device: torch.device
) -> FullSelector:
    return FullSelector(schedule, geometry, device)


METHOD = SparseMethod(
    name="SPARSE_FULL",
    summary="our path with everything kept, for checks",
    paper="none",
    config_cls=MethodConfig,
    schedule=_schedule,
    make_selector=_selector,
    capabilities=Capabilities(
        reads="all KV blocks",
        frees="nothing",
        limits="saves nothing by design; must equal stock vLLM",
    ),
    purpose=Purpose.CHECK,
)
