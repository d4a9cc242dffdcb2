"""ORACLE_TOPK: every layer reads the blocks that carry most of its own attention mass.

An upper bound for methods that choose within a budget, not a saving: to know its own mass a
layer must read all keys. ``vllm-ext eval`` shows it beside the methods; the distance to it is
what sharing a selection between layers costs. The first layers are dense as in TIDAL_DECODE.
"""

from __future__ import annotations

import torch

from attn_backends.budget import BudgetSelector, prompts_cached
from attn_backends.budget_config import ROW_OPTIONS, BudgetConfig
from attn_backends.drafting import drafting_if_asked
from attn_backends.method import Capabilities, Geometry, Purpose, Selector, SparseMethod
from attn_backends.plan import LayerRole, LayerSchedule

DENSE_LAYERS = 2


def _schedule(config: BudgetConfig, geometry: Geometry) -> LayerSchedule:
    dense = min(DENSE_LAYERS, geometry.num_layers)
    return LayerSchedule(
        (LayerRole.DENSE,) * dense + (LayerRole.SELF,) * (geometry.num_layers - dense)
    )


def _selector(
    config: BudgetConfig, schedule: LayerSchedule, geometry: Geometry, device: torch.device
) -> Selector:
    selector = BudgetSelector(config, schedule, geometry, device)
    return drafting_if_asked(selector, config, schedule, geometry, device)


METHOD = SparseMethod(
    name="ORACLE_TOPK",
    summary="every layer reads its own best blocks, for evaluation",
    paper="the oracle of Quest, arXiv 2406.10774, and TidalDecode, by KV block",
    config_cls=BudgetConfig,
    schedule=_schedule,
    make_selector=_selector,
    capabilities=Capabilities(
        reads="everything, then budget_tokens of it again; decode only",
        frees="nothing",
        limits="slower than dense by design: the bound that others are measured against",
    ),
    row_options=ROW_OPTIONS,
    entries=prompts_cached,
    purpose=Purpose.BOUND,
)
