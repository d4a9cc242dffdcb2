"""FLUX: some layers read everything; the others read prompts whole, and answer within a window.

Paper: Flux Attention, arXiv 2604.07394 (qqtang-code/FluxAttention), which routes layers to full or
sparse attention. We differ:

- there is no router yet: a profile says which layers are full, the same ones for every request;
- prompts are computed densely, so that their KV blocks serve everybody; sinks and window hold from
  the first answer token on, by position alone, also where a preempted request computes its answer
  again;
- the blocks in between are freed in the other layers once the prompt is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field

from attn_backends.answer_windows import AnswerWindowSelector, answer_entries
from attn_backends.config import (
    MethodConfig,
    SettingError,
    block_problem,
    one_of,
)
from attn_backends.method import Capabilities, Geometry, SparseMethod
from attn_backends.plan import LayerRole, LayerSchedule
from attn_backends.profile import NoSectionError, ProfileSection, require_placed
from attn_backends.sections import AUTO, chosen_section
from kvcache.entries import KVEntry
from kvcache.spans import Span

RETENTION_CHOICES = ("evict", "keep_all")


class FluxSection(ProfileSection):
    """FLUX's part of a profile.

    Attributes:
        full_layers: read and keep everything.
        sink_tokens: first tokens that the other layers always see.
        window_tokens: last tokens that they see behind the prompt, the current one included.
    """

    made_by: ClassVar[str] = "an editor (docs/tuning.md, FLUX); no command calibrates it yet"

    full_layers: list[int] = Field(default_factory=list)
    sink_tokens: int = Field(ge=0, le=1 << 20)
    window_tokens: int = Field(ge=1, le=1 << 20)

    def require_shape(self, num_layers: int, num_kv_heads: int) -> None:
        """See ``ProfileSection.require_shape``."""
        require_placed({"full_layers": self.full_layers}, num_layers)

    @property
    def span(self) -> Span:
        """What the other layers see behind the prompt."""
        return Span(self.sink_tokens, self.window_tokens)


@dataclass(frozen=True)
class FluxConfig(MethodConfig):
    """Settings of FLUX.

    Attributes:
        profile: path of a profile, or ``auto`` for the one shipped for this model.
        retention: ``evict`` frees what lies between sinks and window once a prompt is computed,
            ``keep_all`` nothing.
    """

    profile: str = AUTO
    retention: str = one_of(RETENTION_CHOICES, default="evict")


def _section(config: FluxConfig, geometry: Geometry) -> FluxSection:
    """What the profile says.

    Raises:
        ConfigError: no profile, one without FLUX's section or of another shape, or a window that
            cannot hold a KV block.
    """
    section = chosen_section(config.profile, geometry, METHOD.name, FluxSection)
    if section is None:
        raise NoSectionError(
            "FLUX needs to know which layers read everything, and no profile with that is shipped "
            "for this model; write a FLUX section into one and name it (--profile FILE; "
            "docs/tuning.md)"
        )
    if problem := block_problem(section.window_tokens, geometry.block_size):
        raise SettingError("profile", f"names a window_tokens of FLUX that {problem}")
    return section


def _schedule(config: FluxConfig, geometry: Geometry) -> LayerSchedule:
    section = _section(config, geometry)
    roles = [
        LayerRole.DENSE if layer in section.full_layers else LayerRole.WINDOW
        for layer in range(geometry.num_layers)
    ]
    heads = (section.span,) * geometry.num_kv_heads
    spans = {layer: heads for layer, role in enumerate(roles) if role is LayerRole.WINDOW}
    return LayerSchedule(tuple(roles), spans=spans, prompts_see_everything=True)


def _selector(
    config: FluxConfig, schedule: LayerSchedule, geometry: Geometry, device: torch.device
) -> AnswerWindowSelector:
    return AnswerWindowSelector(schedule, geometry, device)


def _entries(
    config: FluxConfig, schedule: LayerSchedule, geometry: Geometry
) -> tuple[KVEntry, ...]:
    return answer_entries(schedule, frees=config.retention == "evict")


METHOD = SparseMethod(
    name="FLUX",
    summary="some layers read everything, the others sinks and a window behind the prompt",
    paper="Flux Attention, arXiv 2604.07394",
    config_cls=FluxConfig,
    schedule=_schedule,
    make_selector=_selector,
    capabilities=Capabilities(
        reads="everything in full layers and prompts, sinks and window in the other layers' decode",
        frees="between sinks and window of the other layers, once a prompt is computed",
        limits="needs a profile; saves nothing while prompts are read; no router yet",
    ),
    row_options=frozenset({"sparse"}),
    entries=_entries,
    reach=(),
    profile_section=FluxSection,
    needs_profile=True,
)
