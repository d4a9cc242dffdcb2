"""TIDAL_DECODE: a few anchor layers choose the blocks that all other layers read.

Papers: TidalDecode, arXiv 2410.05076 (position-persistent sparse decode); Kascade, arXiv
2512.16391 (per-KV-head selection, calibrated anchors, head maps). We follow Kascade where they
differ: the blocks of a KV head are chosen by the softmax mass summed over its query heads, and
not by each query head for itself, which reads a KV head once per query head and was not closer
(docs/results.md). We differ from both: selection is by KV block, sink and recent blocks are forced
(TidalDecode's code can drop even the current token), and only decode rows are sparse, so that
chunked prefill and multi-turn prompts stay exact. Anchors attend everything in both papers; ours
score all keys and attend only what they select, which reads half as much and costs little fidelity
(docs/adr/0009; ``anchor_attention``).

Selection is made again in every step, or every ``reselect_steps`` (reselection.py). A policy
(docs/policy.md) may give layers other roles, a window of their own among them, and rows a budget
by their length.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import Field

from attn_backends.batch import RowOptions
from attn_backends.budget import BudgetSelector
from attn_backends.budget_config import PRESETS, ROW_OPTIONS, BudgetConfig
from attn_backends.config import POLICY_KEY, EngineFacts, SettingError, at_least, one_of
from attn_backends.drafting import drafting_if_asked
from attn_backends.method import Capabilities, Geometry, Selector, SparseMethod
from attn_backends.plan import CHOOSING_ROLES, LayerRole, LayerSchedule
from attn_backends.policy.composition import compose, retention_of
from attn_backends.policy.model import NO_POLICY, Policy, PolicyError
from attn_backends.policy.reading import parse_policy
from attn_backends.profile import ProfileSection, require_placed
from attn_backends.sections import AUTO, chosen_section
from kvcache.entries import KVEntry, layer_entries
from kvcache.retention import KeepAll

logger = logging.getLogger("vllm.vllm_ext")

FALLBACK_DENSE_LAYERS = 2
FALLBACK_ANCHOR_STRIDE = 2
ANCHOR_ATTENTION = ("selected", "full")


class AnchorSection(ProfileSection):
    """TIDAL_DECODE's part of a profile.

    Attributes:
        dense_layers: attend everything.
        anchor_layers: choose for the layers after them, up to the next one.
        head_maps: of other layers, where their KV heads do not follow the anchor's of the same
            index: the anchor's head that each one follows.
        drop_layers: attend nothing and keep nothing (LLM-Drop).
    """

    made_by: ClassVar[str] = "vllm-ext profile MODEL --output FILE"

    dense_layers: list[int]
    anchor_layers: list[int]
    head_maps: dict[int, list[int]]
    drop_layers: list[int] = Field(default_factory=list)

    @classmethod
    def of(cls, schedule: LayerSchedule) -> AnchorSection:
        """The section that gives this schedule."""
        return cls(
            dense_layers=list(schedule.of_role(LayerRole.DENSE)),
            anchor_layers=list(schedule.of_role(*CHOOSING_ROLES)),
            head_maps={layer: list(heads) for layer, heads in schedule.head_maps.items()},
            drop_layers=list(schedule.dropped),
        )

    def require_shape(self, num_layers: int, num_kv_heads: int) -> None:
        """See ``ProfileSection.require_shape``; layers before the first anchor reuse nothing."""
        names = ("dense_layers", "anchor_layers", "drop_layers")
        require_placed({name: getattr(self, name) for name in names}, num_layers)
        first_anchor = min(self.anchor_layers, default=num_layers)
        uncovered = {*range(first_anchor)} - {*self.dense_layers, *self.drop_layers}
        if uncovered:
            raise ValueError(
                f"layers {sorted(uncovered)} come before the first anchor and are not dense"
            )
        for layer, heads in self.head_maps.items():
            if not 0 <= layer < num_layers:
                raise ValueError(f"head_maps has layer {layer} of {num_layers}")
            if len(heads) != num_kv_heads or not all(0 <= head < num_kv_heads for head in heads):
                raise ValueError(
                    f"head_maps[{layer}] is {heads}; it needs {num_kv_heads} heads between 0 and "
                    f"{num_kv_heads - 1}"
                )

    def schedule(self, num_layers: int) -> LayerSchedule:
        """Roles and head maps of the layers; anchors attend everything."""
        placed = {
            **dict.fromkeys(self.dense_layers, LayerRole.DENSE),
            **dict.fromkeys(self.anchor_layers, LayerRole.ANCHOR),
            **dict.fromkeys(self.drop_layers, LayerRole.DROP),
        }
        roles = tuple(placed.get(layer, LayerRole.REUSE) for layer in range(num_layers))
        return LayerSchedule(
            roles,
            {layer: tuple(h) for layer, h in self.head_maps.items() if layer not in placed},
        )


@dataclass(frozen=True)
class TidalConfig(BudgetConfig):
    """Settings of TIDAL_DECODE.

    Attributes:
        profile: path of a profile, or ``auto`` for the one shipped for this model.
        anchor_attention: anchor layers score all keys in either case, and attend only what they
            select, without reading other values, or everything.
        reselect_steps: decode steps from one selection to the next; it must divide the KV block.
            Guard checks then come as many steps later as lets them meet selections of every age.
        policy: of layers, budgets and presets; read from a document (``compose``).
    """

    profile: str = AUTO
    anchor_attention: str = one_of(ANCHOR_ATTENTION, default="selected")
    reselect_steps: int = at_least(1, "steps", default=1)
    policy: Policy = NO_POLICY

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reselect_steps > 1 and self.anchor_attention == "full":
            raise SettingError(
                "reselect_steps",
                f"is {self.reselect_steps}, but anchors that attend everything read it in every "
                "step; set vllm_ext.anchor_attention to selected",
            )
        if self.reselect_steps > 1:
            self.refuse_with_drafts("reselect_steps", "1")
        if self.anchor_attention == "full":
            self.refuse_with_drafts("anchor_attention", "selected")
        self.policy.require_budgets(self.least_budget_tokens, self.min_context_tokens)

    @classmethod
    def compose(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See ``MethodConfig.compose``: the policy's settings beside those given without it."""
        values = {key: value for key, value in raw.items() if key != POLICY_KEY}
        policy = parse_policy(raw.get(POLICY_KEY, {}), cls, ("on", "off", *PRESETS))
        for key, value in policy.settings.items():
            if values.setdefault(key, value) != value:
                raise PolicyError(
                    ("settings", key),
                    f"is {value!r}, but vllm_ext.{key} is {values[key]!r}; give it once",
                )
        return {**values, POLICY_KEY: policy}

    def check(self, engine: EngineFacts) -> None:
        """See ``MethodConfig.check``: a kept selection must not outlive a KV block, and which rows
        read one changes from step to step, which no CUDA graph does.
        """
        super().check(engine)
        steps, block_size = self.reselect_steps, engine.block_size
        if block_size % steps:
            fitting = [n for n in range(1, block_size + 1) if block_size % n == 0]
            raise SettingError(
                "reselect_steps",
                f"is {steps}, which does not divide a KV block of {block_size} tokens; use one "
                f"of {', '.join(map(str, fitting))}",
            )
        if steps > 1 and engine.device_type != "cpu":
            raise SettingError(
                "reselect_steps",
                f"is {steps}, but on GPUs decode steps are CUDA graphs, in which every row "
                "selects; set it to 1",
            )

    @property
    def presets(self) -> Mapping[str, RowOptions]:
        """See ``MethodConfig.presets``."""
        return {**PRESETS, **self.policy.presets}


class TidalSelector(BudgetSelector):
    """Budgets by context length."""

    def __init__(
        self,
        config: TidalConfig,
        schedule: LayerSchedule,
        geometry: Geometry,
        device: torch.device,
    ) -> None:
        reselect_steps = config.reselect_steps
        super().__init__(_checking_every_age(config), schedule, geometry, device, reselect_steps)
        self._policy = config.policy

    def _budget_kind(self, seq_len: int) -> Hashable:
        return self._policy.budget_of(seq_len)

    def _server_budget_blocks(self, seq_lens: torch.Tensor) -> torch.Tensor:
        budgets = super()._server_budget_blocks(seq_lens)
        # The shortest entry that fits wins, so it is written last.
        for entry in reversed(self._policy.budgets):
            tokens = seq_lens if entry.budget_tokens is None else entry.budget_tokens
            blocks = -(-tokens // self._block_size)
            budgets = torch.where(seq_lens <= entry.up_to_tokens, blocks, budgets)
        return budgets.to(torch.int32)


def _selector(
    config: TidalConfig, schedule: LayerSchedule, geometry: Geometry, device: torch.device
) -> Selector:
    selector = TidalSelector(config, schedule, geometry, device)
    return drafting_if_asked(selector, config, schedule, geometry, device)


def _checking_every_age(config: TidalConfig) -> TidalConfig:
    """Guard checks and selections out of step: a check would else see one age of them only."""
    interval_steps = config.guard_interval_steps
    while math.gcd(interval_steps, config.reselect_steps) > 1:
        interval_steps += 1
    return replace(config, guard_interval_steps=interval_steps)


@functools.cache
def _warn_once(message: str) -> None:
    """Every builder and worker asks for the schedule; one warning a process is enough."""
    logger.warning(message)


def _schedule(config: TidalConfig, geometry: Geometry) -> LayerSchedule:
    base = _base_schedule(config, geometry)
    composition = compose(config.policy, base, geometry.block_size, geometry.num_kv_heads)
    if composition.unmapped_layers:
        _warn_once(
            f"TIDAL_DECODE: under the policy, layers {list(composition.unmapped_layers)} follow "
            "another anchor than in the profile, whose head maps do not apply there: each KV "
            "head follows the anchor's same one, uncalibrated"
        )
    if config.anchor_attention == "full":
        return composition.schedule
    return composition.schedule.with_narrow_anchors()


def _entries(
    config: TidalConfig, schedule: LayerSchedule, geometry: Geometry
) -> tuple[KVEntry, ...]:
    base = (KeepAll(caches_generated=config.is_lossless),) * geometry.num_layers
    return layer_entries(retention_of(config.policy, base), schedule.dropped)


def _base_schedule(config: TidalConfig, geometry: Geometry) -> LayerSchedule:
    section = chosen_section(config.profile, geometry, METHOD.name, AnchorSection)
    if section is not None:
        return section.schedule(geometry.num_layers)
    _warn_once(
        f"TIDAL_DECODE has no profile for this model: layers 0-{FALLBACK_DENSE_LAYERS - 1} dense, "
        f"then one anchor in every {FALLBACK_ANCHOR_STRIDE}. That is slow and not calibrated; run: "
        "vllm-ext profile MODEL"
    )
    roles = [LayerRole.DENSE] * FALLBACK_DENSE_LAYERS
    cycle = [LayerRole.ANCHOR] + [LayerRole.REUSE] * (FALLBACK_ANCHOR_STRIDE - 1)
    roles += cycle * geometry.num_layers
    return LayerSchedule(tuple(roles[: geometry.num_layers]))


METHOD = SparseMethod(
    name="TIDAL_DECODE",
    summary="anchor layers choose the blocks that the other layers read",
    paper="TidalDecode, arXiv 2410.05076; Kascade, arXiv 2512.16391",
    config_cls=TidalConfig,
    schedule=_schedule,
    make_selector=_selector,
    capabilities=Capabilities(
        reads="everything in dense layers, all keys in anchors, budget_tokens elsewhere; in decode",
        frees="nothing, except what a policy's window layers leave out",
        limits="needs a calibrated profile (vllm-ext profile); short contexts gain nothing",
    ),
    row_options=ROW_OPTIONS,
    entries=_entries,
    profile_section=AnchorSection,
)
