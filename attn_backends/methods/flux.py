"""FLUX: some layers read everything; the others read prompts whole, and answer within a window.

Paper: Flux Attention, arXiv 2604.07394 (qqtang-code/FluxAttention), which routes layers to full or
sparse attention. We differ:

- a profile says which layers are always full, and which groups of layers each request's route
  decides about; a group is full only where those before it are;
- routes are decided by the attention that a prompt's last queries put between sinks and window,
  per KV head, and not by pooled queries: the same however a prompt was chunked or cached;
- prompts are computed densely, so that their KV blocks serve everybody; sinks and window hold from
  the first answer token on, by position alone, also where a preempted request computes its answer
  again;
- the blocks in between are freed in the other layers once the prompt is computed and routed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator

from attn_backends.answer_windows import AnswerWindowSelector, answer_entries
from attn_backends.config import (
    MethodConfig,
    SettingError,
    block_problem,
    one_of,
)
from attn_backends.method import Capabilities, Geometry, SparseMethod
from attn_backends.plan import LayerRole, LayerSchedule
from attn_backends.profile import (
    NoSectionError,
    Profile,
    ProfileSection,
    Sha256,
    require_placed,
)
from attn_backends.routing import Router, read_router
from attn_backends.sections import AUTO, chosen_profile
from kvcache.entries import KVEntry
from kvcache.spans import Span

RETENTION_CHOICES = ("evict", "keep_all")
ROUTE_CHOICES = ("profile", "full", "sparse")
MAX_ROUTED_GROUPS = 8  # each is a KV group: the scheduler's work grows with them
RouterFileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.safetensors$")]


class FluxSection(ProfileSection):
    """FLUX's part of a profile.

    Attributes:
        full_layers: read and keep everything.
        routed_groups: layers that a request's route decides together, in nested order: a group is
            full only where all groups before it are. Layers in no list have the window.
        sink_tokens: first tokens that the other layers always see.
        window_tokens: last tokens that they see behind the prompt, the current one included.
        evidence_tokens: last queries of a prompt, whose attention mass in the gap decides.
        router_file: weights of the routers, a file beside the profile (``routing.read_router``).
        router_sha256: of that file.
    """

    made_by: ClassVar[str] = "vllm-ext profile MODEL --method flux --output FILE"

    full_layers: list[int] = Field(default_factory=list)
    routed_groups: list[Annotated[list[int], Field(min_length=1)]] = Field(
        default_factory=list, max_length=MAX_ROUTED_GROUPS
    )
    sink_tokens: int = Field(ge=0, le=1 << 20)
    window_tokens: int = Field(ge=1, le=1 << 20)
    evidence_tokens: int = Field(32, ge=1, le=1024)
    router_file: RouterFileName | None = None
    router_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _routers_are_named(self) -> FluxSection:
        named = (self.router_file, self.router_sha256)
        if self.routed_groups and None in named:
            raise ValueError(
                "routed_groups need router_file, a .safetensors file beside the profile, and its "
                "router_sha256; name them, or drop routed_groups"
            )
        if not self.routed_groups and named != (None, None):
            raise ValueError(
                "router_file and router_sha256 are for routed_groups, and there are none; drop them"
            )
        return self

    def require_shape(self, num_layers: int, num_kv_heads: int) -> None:
        """See ``ProfileSection.require_shape``."""
        groups = {f"routed_groups[{i}]": group for i, group in enumerate(self.routed_groups)}
        require_placed({"full_layers": self.full_layers, **groups}, num_layers)
        for name, group in groups.items():
            if len({*group}) < len(group):
                raise ValueError(f"{name} names a layer twice: {group}")

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
        routes: ``profile`` lets its routers decide about the routed groups; ``full`` and
            ``sparse`` force all of them one way, for comparisons.
    """

    profile: str = AUTO
    retention: str = one_of(RETENTION_CHOICES, default="evict")
    routes: str = one_of(ROUTE_CHOICES, default="profile")


def _profile(config: FluxConfig, geometry: Geometry) -> Profile:
    """The chosen profile.

    Raises:
        ConfigError: no profile, or one of another shape.
    """
    profile = chosen_profile(config.profile, geometry, METHOD.name)
    if profile is None:
        raise NoSectionError(
            "FLUX needs to know which layers read everything, and no profile with that is shipped "
            f"for this model; make one with `{FluxSection.made_by}` and name it (--profile FILE)"
        )
    return profile


def _section(config: FluxConfig, geometry: Geometry) -> FluxSection:
    """What the profile says.

    Raises:
        ConfigError: see ``_profile``; or nothing valid for FLUX, a window that cannot hold a KV
            block, or nothing that could be routed as it is asked for.
    """
    section = _profile(config, geometry).section(METHOD.name, FluxSection)
    if problem := block_problem(section.window_tokens, geometry.block_size):
        raise SettingError("profile", f"names a window_tokens of FLUX that {problem}")
    if config.routes != "profile" and not section.routed_groups:
        raise SettingError(
            "routes",
            f"is {config.routes!r}, but the profile has no routed_groups of FLUX: no route can be "
            "forced; drop it, or name a profile with routers",
        )
    return section


def _router(config: FluxConfig, geometry: Geometry) -> Router | None:
    """What routes; None where no group is routed.

    Raises:
        ConfigError: see ``_section``; or the router's file is not the one that the profile names,
            or not valid.
    """
    section = _section(config, geometry)
    shape = (len(section.routed_groups), geometry.num_layers, geometry.num_kv_heads)
    if not section.routed_groups:
        return None
    if config.routes != "profile":
        return Router.forced(*shape, is_full=config.routes == "full")
    # Named, or the section would not be valid.
    name, sha256 = str(section.router_file), str(section.router_sha256)
    content = _profile(config, geometry).read_beside(name, sha256)
    return read_router(content, shape, section.evidence_tokens, named=f"router file {name}")


def _schedule(config: FluxConfig, geometry: Geometry) -> LayerSchedule:
    section = _section(config, geometry)
    roles = [
        LayerRole.DENSE if layer in section.full_layers else LayerRole.WINDOW
        for layer in range(geometry.num_layers)
    ]
    heads = (section.span,) * geometry.num_kv_heads
    return LayerSchedule(
        tuple(roles),
        spans={layer: heads for layer, role in enumerate(roles) if role is LayerRole.WINDOW},
        prompts_see_everything=True,
        routed_groups=tuple(tuple(sorted(group)) for group in section.routed_groups),
    )


def _selector(
    config: FluxConfig, schedule: LayerSchedule, geometry: Geometry, device: torch.device
) -> AnswerWindowSelector:
    return AnswerWindowSelector(schedule, geometry, device, _router(config, geometry))


def _entries(
    config: FluxConfig, schedule: LayerSchedule, geometry: Geometry
) -> tuple[KVEntry, ...]:
    router = _router(config, geometry)
    reread_tokens = 0 if router is None else router.reread_tokens
    return answer_entries(schedule, config.retention == "evict", reread_tokens)


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
        limits="needs a profile, with routers to route; saves nothing while prompts are read",
    ),
    row_options=frozenset({"sparse"}),
    entries=_entries,
    reach=(),
    profile_section=FluxSection,
    needs_profile=True,
)
