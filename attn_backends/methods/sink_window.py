"""SINK_WINDOW: every query attends the first S tokens and the last W tokens.

Paper: StreamingLLM, arXiv 2309.17453. We differ: keys keep their original positions
(vLLM caches them after RoPE, and within the trained length that is what the model saw),
and the rule holds per query in prefill, chunked prefill and decode alike. What no later
query may see is evicted, also while a prompt is still read in chunks; ``retention:
keep_all`` selects only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from attn_backends.config import (
    EngineFacts,
    SettingError,
    at_least,
    block_problem,
    one_of,
)
from attn_backends.lossless_config import LosslessConfig
from attn_backends.method import Capabilities, Geometry, SparseMethod, keep_everything
from attn_backends.plan import LayerRole, LayerSchedule
from attn_backends.profile import ProfileSection, load_profile, require_fit, require_placed
from attn_backends.windows import WindowSelector, window_entries
from kvcache.entries import KVEntry
from kvcache.spans import Span, everything

RETENTION_CHOICES = ("evict", "keep_all")


class WindowSection(ProfileSection):
    """SINK_WINDOW's part of a profile; what it does not name has the window.

    Attributes:
        full_layers: keep and read everything.
        full_heads: by layer, the KV heads that keep and read everything while the layer's others
            have the window.
        drop_layers: attend nothing and keep nothing (LLM-Drop).
    """

    made_by: ClassVar[str] = "vllm-ext profile MODEL --output FILE --drop N --window-instead"

    full_layers: list[int] = Field(default_factory=list)
    full_heads: dict[int, list[int]] = Field(default_factory=dict)
    drop_layers: list[int] = Field(default_factory=list)

    def require_shape(self, num_layers: int, num_kv_heads: int) -> None:
        """See ``ProfileSection.require_shape``."""
        names = ("full_layers", "full_heads", "drop_layers")
        require_placed({name: getattr(self, name) for name in names}, num_layers)
        for layer, heads in self.full_heads.items():
            known = {*heads} <= {*range(num_kv_heads)}
            if not known or len({*heads}) < len(heads) or not 0 < len(heads) < num_kv_heads:
                raise ValueError(
                    f"full_heads[{layer}] is {heads}; name some of its heads 0 to "
                    f"{num_kv_heads - 1}, each once (for all of them: full_layers)"
                )


@dataclass(frozen=True)
class SinkWindowConfig(LosslessConfig):
    """Settings of SINK_WINDOW.

    Attributes:
        sink_tokens: first tokens that are always attended.
        window_tokens: last tokens that are attended, the current one included; at least
            one KV block.
        retention: ``evict`` frees the blocks between sinks and window, ``keep_all`` does not.
        profile: path of a profile whose ``full_layers`` and ``full_heads`` keep and read everything
            (DuoAttention's split, arXiv 2410.10819) and whose ``drop_layers`` attend nothing and
            keep nothing (LLM-Drop); empty: every layer has the window.

    Raises:
        ConfigError: a value out of its range.
    """

    sink_tokens: int = at_least(0, "tokens", default=64)
    window_tokens: int = at_least(1, "tokens", default=1024)
    retention: str = one_of(RETENTION_CHOICES, default="evict")
    profile: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retention == "evict":
            self.refuse_with_drafts("retention", "keep_all")

    def check(self, engine: EngineFacts) -> None:
        """See ``MethodConfig.check``."""
        super().check(engine)
        if problem := block_problem(self.window_tokens, engine.block_size):
            raise SettingError("window_tokens", problem)


def _section(config: SinkWindowConfig, geometry: Geometry) -> WindowSection:
    profile = load_profile(Path(config.profile))
    require_fit(profile, geometry.num_layers, geometry.num_kv_heads)
    return profile.section(METHOD.name, WindowSection)


def _schedule(config: SinkWindowConfig, geometry: Geometry) -> LayerSchedule:
    section = _section(config, geometry) if config.profile else WindowSection()
    window = Span(config.sink_tokens, config.window_tokens)
    heads = range(geometry.num_kv_heads)
    roles, spans = [], {}
    for layer in range(geometry.num_layers):
        if layer in section.full_layers:
            roles.append(LayerRole.DENSE)
        elif layer in section.drop_layers:
            roles.append(LayerRole.DROP)
        else:
            full = section.full_heads.get(layer, [])
            roles.append(LayerRole.WINDOW)
            spans[layer] = tuple(everything() if head in full else window for head in heads)
    return LayerSchedule(tuple(roles), spans=spans)


def _selector(
    config: SinkWindowConfig, schedule: LayerSchedule, geometry: Geometry, device: torch.device
) -> WindowSelector:
    return WindowSelector(schedule, geometry, device)


def _entries(
    config: SinkWindowConfig, schedule: LayerSchedule, geometry: Geometry
) -> tuple[KVEntry, ...]:
    if config.retention == "keep_all":
        return keep_everything(config, schedule, geometry)
    return window_entries(schedule, geometry.num_kv_heads)


METHOD = SparseMethod(
    name="SINK_WINDOW",
    summary="first S tokens and last W tokens, exact per query",
    paper="StreamingLLM, arXiv 2309.17453",
    config_cls=SinkWindowConfig,
    schedule=_schedule,
    make_selector=_selector,
    capabilities=Capabilities(
        reads="sink_tokens + window_tokens per layer, prefill included",
        frees="all blocks between sinks and window, as they fall out of it",
        limits="cannot recall what lies between sinks and window",
    ),
    entries=_entries,
    reach=("sink_tokens", "window_tokens"),
    profile_section=WindowSection,
)
