"""SINK_WINDOW: every query attends the first S tokens and the last W tokens.

Paper: StreamingLLM, arXiv 2309.17453. We differ: keys keep their original positions
(vLLM caches them after RoPE, and within the trained length that is what the model saw),
and the rule holds per query in prefill, chunked prefill and decode alike. What no later
query may see is evicted, also while a prompt is still read in chunks; ``retention:
keep_all`` selects only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from attn_backends.batch import BlockSelection, PagedBatch, RowOptions, SpanRule
from attn_backends.config import (
    ConfigError,
    EngineFacts,
    MethodConfig,
    SettingError,
    at_least,
    block_problem,
    one_of,
)
from attn_backends.method import Capabilities, Geometry, SparseMethod
from attn_backends.plan import AnchorState, LayerRole, LayerSchedule
from attn_backends.profile import ProfileSection, load_profile, require_fit, require_placed
from attn_backends.recall import RecallWatch
from attn_backends.reselection import SelectionKeeper
from kvcache.retention import KeepAll, RetentionPolicy, SinkWindowRetention

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
class SinkWindowConfig(MethodConfig):
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

    def check(self, engine: EngineFacts) -> None:
        """See ``MethodConfig.check``."""
        if problem := block_problem(self.window_tokens, engine.block_size):
            raise SettingError("window_tokens", problem)


class SinkWindowSelector:
    """Sink blocks and window blocks, the same for every KV head of a row."""

    watch: RecallWatch | None = None  # no anchors
    keeper: SelectionKeeper | None = None

    def __init__(self, config: SinkWindowConfig, geometry: Geometry, device: torch.device) -> None:
        self._config = config
        self._block_size = geometry.block_size
        self._num_sink_blocks = -(-config.sink_tokens // geometry.block_size)
        # A window of W tokens touches at most this many blocks, wherever it starts.
        num_window_blocks = (config.window_tokens - 2) // geometry.block_size + 2
        heads = geometry.num_kv_heads
        shape = (geometry.max_num_reqs, heads, self._num_sink_blocks + num_window_blocks)
        self._steps = torch.arange(shape[2], dtype=torch.int32, device=device)
        self._blocks = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._counts = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        self._sink = torch.full(shape[:2], config.sink_tokens, dtype=torch.int32, device=device)
        self._window = torch.full(shape[:2], config.window_tokens, dtype=torch.int32, device=device)

    def select(self, batch: PagedBatch) -> BlockSelection:
        """See ``Selector.select``."""
        num_blocks = (batch.seq_lens + self._block_size - 1) // self._block_size
        first_window_token = (batch.seq_lens - self._config.window_tokens).clamp_(min=0)
        first_window_block = first_window_token // self._block_size
        # Blocks that lie between sinks and window; 0 where the two touch or overlap.
        gap = (first_window_block - self._num_sink_blocks).clamp_(min=0)
        count = (num_blocks - gap).to(torch.int32)
        logical = self._steps + torch.where(self._steps >= self._num_sink_blocks, gap[:, None], 0)
        chosen = torch.where(self._steps < count[:, None], logical, -1)
        blocks, counts = self._blocks[: batch.num_reqs], self._counts[: batch.num_reqs]
        blocks.copy_(chosen[:, None, :])
        counts.copy_(count[:, None])
        return BlockSelection(blocks, counts)

    def anchor_state(
        self, batch: PagedBatch, options: Mapping[int, RowOptions]
    ) -> AnchorState | None:
        """See ``Selector.anchor_state``: no anchors."""
        return None

    def span_rule(self, num_reqs: int) -> SpanRule | None:
        """See ``Selector.span_rule``."""
        return SpanRule(self._sink[:num_reqs], self._window[:num_reqs])

    def row_reasons(
        self, seq_lens_cpu: torch.Tensor, options: Mapping[int, RowOptions]
    ) -> list[tuple[str, str]]:
        """See ``Selector.row_reasons``."""
        budget_tokens = self._config.sink_tokens + self._config.window_tokens
        return [
            ("sparse", "selected" if seq_len > budget_tokens else "everything_kept")
            for seq_len in seq_lens_cpu.tolist()
        ]


def _section(config: SinkWindowConfig, geometry: Geometry) -> WindowSection:
    profile = load_profile(Path(config.profile))
    require_fit(profile, geometry.num_layers, geometry.num_kv_heads)
    return profile.section(METHOD.name, WindowSection)


def _schedule(config: SinkWindowConfig, geometry: Geometry) -> LayerSchedule:
    placed: dict[int, LayerRole] = {}
    if config.profile:
        section = _section(config, geometry)
        if section.full_heads:
            raise ConfigError(
                f"profile {config.profile} has full_heads for layers {sorted(section.full_heads)}, "
                "which this version does not serve yet: use full_layers"
            )
        placed = {
            **dict.fromkeys(section.full_layers, LayerRole.DENSE),
            **dict.fromkeys(section.drop_layers, LayerRole.DROP),
        }
    layers = range(geometry.num_layers)
    return LayerSchedule(tuple(placed.get(layer, LayerRole.SELECTED) for layer in layers))


def _retention(config: SinkWindowConfig, geometry: Geometry) -> tuple[RetentionPolicy, ...]:
    if config.retention == "keep_all":
        return (KeepAll(),) * geometry.num_layers
    window = SinkWindowRetention(config.sink_tokens, config.window_tokens)
    return tuple(
        KeepAll() if role is LayerRole.DENSE else window
        for role in _schedule(config, geometry).roles
    )


METHOD = SparseMethod(
    name="SINK_WINDOW",
    summary="first S tokens and last W tokens, exact per query",
    paper="StreamingLLM, arXiv 2309.17453",
    config_cls=SinkWindowConfig,
    schedule=_schedule,
    make_selector=SinkWindowSelector,
    capabilities=Capabilities(
        reads="sink_tokens + window_tokens per layer, prefill included",
        frees="all blocks between sinks and window, as they fall out of it",
        limits="cannot recall what lies between sinks and window",
    ),
    retention=_retention,
    profile_section=WindowSection,
)
