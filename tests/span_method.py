"""SPANS_BY_HEAD: three classes of KV heads with spans of their own, in the tests' registry alone.

What MoA needs of the house, without its profiles: full heads, heads with a window, and heads whose
window grows with the position, in one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_backends.config import MethodConfig, one_of
from attn_backends.method import Capabilities, Geometry, SparseMethod, keep_everything
from attn_backends.plan import LayerRole, LayerSchedule
from attn_backends.windows import WindowSelector, window_entries
from kvcache.entries import KVEntry
from kvcache.spans import Span, everything

NAME = "SPANS_BY_HEAD"
LINE = "tests.span_method:METHOD"
CLASSES = (everything(), Span(40, 200), Span(40, 128, alpha_tokens=-64, beta_64ths=24))


@dataclass(frozen=True)
class SpanConfig(MethodConfig):
    """Settings of SPANS_BY_HEAD.

    Attributes:
        retention: ``evict`` frees what a head's span does not show, ``keep_all`` nothing.
    """

    retention: str = one_of(("evict", "keep_all"), default="evict")


def _schedule(config: SpanConfig, geometry: Geometry) -> LayerSchedule:
    heads, layers = range(geometry.num_kv_heads), range(geometry.num_layers)
    spans = {
        layer: tuple(CLASSES[(layer + head) % len(CLASSES)] for head in heads) for layer in layers
    }
    return LayerSchedule((LayerRole.WINDOW,) * geometry.num_layers, spans=spans)


def _selector(
    config: SpanConfig, schedule: LayerSchedule, geometry: Geometry, device: torch.device
) -> WindowSelector:
    return WindowSelector(schedule, geometry, device)


def _entries(
    config: SpanConfig, schedule: LayerSchedule, geometry: Geometry
) -> tuple[KVEntry, ...]:
    if config.retention == "keep_all":
        return keep_everything(config, schedule, geometry)
    return window_entries(schedule, geometry.num_kv_heads)


METHOD = SparseMethod(
    name=NAME,
    summary="three classes of heads",
    paper="none",
    config_cls=SpanConfig,
    schedule=_schedule,
    make_selector=_selector,
    capabilities=Capabilities(reads="its spans", frees="what they do not show", limits="a toy"),
    entries=_entries,
    reach=(),
)
