"""TOY_TOPK: a method as somebody would add it, in the registry of the tests alone.

What it takes to be served, measured and shown is this module and one line of the registry:
``tests/unit/test_new_method.py`` and ``tests/e2e/test_new_method.py`` hold the product to that.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_backends.budget import BudgetSelector, prompts_cached
from attn_backends.budget_config import ROW_OPTIONS, BudgetConfig
from attn_backends.config import at_least
from attn_backends.method import Capabilities, Geometry, SparseMethod
from attn_backends.plan import LayerRole, LayerSchedule

NAME = "TOY_TOPK"
LINE = "tests.toy_method:METHOD"  # what the registry says of it


@dataclass(frozen=True)
class ToyConfig(BudgetConfig):
    """Settings of TOY_TOPK.

    Attributes:
        toy_dense_layers: first layers that read everything.
    """

    toy_dense_layers: int = at_least(1, "layers", default=3)


def _schedule(config: ToyConfig, geometry: Geometry) -> LayerSchedule:
    dense = min(config.toy_dense_layers, geometry.num_layers)
    return LayerSchedule(
        (LayerRole.DENSE,) * dense + (LayerRole.SELF,) * (geometry.num_layers - dense)
    )


METHOD = SparseMethod(
    name=NAME,
    summary="every layer but the first reads its own best blocks",
    paper="none",
    config_cls=ToyConfig,
    schedule=_schedule,
    make_selector=BudgetSelector,
    capabilities=Capabilities(
        reads="everything, then budget_tokens of it again",
        frees="nothing",
        limits="a toy",
    ),
    row_options=ROW_OPTIONS,
    entries=prompts_cached,
)
