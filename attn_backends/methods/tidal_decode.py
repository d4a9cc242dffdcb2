"""TIDAL_DECODE: a few anchor layers choose the blocks that all other layers read.

Papers: TidalDecode, arXiv 2410.05076 (position-persistent sparse decode); Kascade, arXiv
2512.16391 (per-KV-head selection, calibrated anchors, head maps). We follow Kascade where
they differ: the blocks of a KV head are chosen by the softmax mass summed over its query
heads, and not by raw logits per query head. We differ from both: selection is by KV block,
sink and recent blocks are forced (TidalDecode's code can drop even the current token),
anchors attend densely, and only decode rows are sparse, so that chunked prefill and
multi-turn prompts stay exact.

Selection is made again in every step.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from attn_backends.batch import BlockSelection, PagedBatch, RowOptions, SpanRule
from attn_backends.config import ConfigError, MethodConfig
from attn_backends.method import Capabilities, Geometry, SparseMethod
from attn_backends.plan import AnchorState, LayerRole, LayerSchedule
from attn_backends.profile import Profile, load_profile, shipped_profile

logger = logging.getLogger("vllm.vllm_ext")

FALLBACK_DENSE_LAYERS = 2
FALLBACK_ANCHOR_STRIDE = 2


@dataclass(frozen=True)
class TidalConfig(MethodConfig):
    """Settings of TIDAL_DECODE.

    Attributes:
        budget_tokens: tokens that a KV head reads in a reuse layer, in whole KV blocks,
            forced blocks included.
        sink_tokens: first tokens that are always read.
        recent_tokens: last tokens that are always read; at least the current block is.
        min_context_tokens: rows up to this length are served dense, and counted so.
        profile: path of a profile, or ``auto`` for the one shipped for this model.

    Raises:
        ConfigError: a value out of its range.
    """

    budget_tokens: int = 512
    sink_tokens: int = 32
    recent_tokens: int = 64
    min_context_tokens: int = 1024
    profile: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        lowest = {"budget_tokens": 1, "sink_tokens": 0, "recent_tokens": 0}
        for field, bound in (lowest | {"min_context_tokens": 0}).items():
            value = getattr(self, field)
            if not bound <= value <= 1 << 20:
                raise ConfigError(
                    f"vllm_ext.{field} is {value}; it must be between {bound} and {1 << 20} tokens"
                )
        forced_tokens = self.sink_tokens + self.recent_tokens
        if self.budget_tokens < forced_tokens:
            raise ConfigError(
                f"vllm_ext.budget_tokens is {self.budget_tokens}, less than sink_tokens + "
                f"recent_tokens = {forced_tokens}; raise the budget or lower those"
            )


class TidalSelector:
    """Owns the selection that anchors fill and reuse layers read."""

    def __init__(self, config: TidalConfig, geometry: Geometry, device: torch.device) -> None:
        self._config = config
        self._block_size = block_size = geometry.block_size
        self._budget_blocks = -(-config.budget_tokens // block_size)
        self._sink_blocks = -(-config.sink_tokens // block_size)
        self._recent_blocks = -(-config.recent_tokens // block_size)
        self._max_blocks = -(-geometry.max_model_len // block_size)
        shape = (geometry.max_num_reqs, geometry.num_kv_heads, self._max_blocks)
        self._blocks = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._counts = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        self._mass = torch.zeros(shape, dtype=torch.float32, device=device)
        self._budgets = torch.zeros(shape[0], dtype=torch.int32, device=device)

    def select(self, batch: PagedBatch) -> BlockSelection:
        """See ``Selector.select``: the buffers that anchors will fill."""
        rows = batch.num_reqs
        return BlockSelection(self._blocks[:rows], self._counts[:rows])

    def anchor_state(
        self, batch: PagedBatch, options: Mapping[int, RowOptions]
    ) -> AnchorState | None:
        """See ``Selector.anchor_state``; short and dense rows get a budget for everything."""
        rows = batch.num_reqs
        budgets = self._budgets[:rows]
        budgets.fill_(self._budget_blocks)
        for row, row_options in options.items():
            budgets[row] = self._budget_of(row_options)
        is_short = batch.seq_lens <= self._config.min_context_tokens
        budgets.masked_fill_(is_short, self._max_blocks)
        return AnchorState(self._mass[:rows], budgets, self._sink_blocks, self._recent_blocks)

    def span_rule(self, num_reqs: int) -> SpanRule | None:
        """See ``Selector.span_rule``: all tokens of a selected block count."""
        return None

    def _budget_of(self, options: RowOptions) -> int:
        if options.is_dense:
            return self._max_blocks
        if options.budget_tokens is None:
            return self._budget_blocks
        return min(self._max_blocks, -(-options.budget_tokens // self._block_size))

    def row_reasons(
        self, seq_lens_cpu: torch.Tensor, options: Mapping[int, RowOptions]
    ) -> dict[tuple[str, str], int]:
        """See ``Selector.row_reasons``."""
        counts: Counter[tuple[str, str]] = Counter()
        for row, seq_len in enumerate(seq_lens_cpu.tolist()):
            row_options = options.get(row, RowOptions())
            if row_options.is_dense:
                counts["dense", "request_off"] += 1
            elif seq_len <= self._config.min_context_tokens:
                counts["dense", "short_context"] += 1
            elif seq_len <= self._budget_of(row_options) * self._block_size:
                counts["sparse", "everything_kept"] += 1
            else:
                counts["sparse", "selected"] += 1
        return dict(counts)


def _resolve_profile(config: TidalConfig, geometry: Geometry) -> Profile | None:
    if config.profile != "auto":
        profile = load_profile(Path(config.profile))
    else:
        found = shipped_profile(Path(geometry.model_path))
        if found is None:
            return None
        profile = found
    if (profile.num_layers, profile.num_kv_heads) != (geometry.num_layers, geometry.num_kv_heads):
        raise ConfigError(
            f"profile for {profile.model} has {profile.num_layers} layers of "
            f"{profile.num_kv_heads} KV heads; this model has {geometry.num_layers} of "
            f"{geometry.num_kv_heads} (tensor parallelism is not supported by profiles yet). "
            "Make one with: vllm-ext profile MODEL"
        )
    return profile


def _schedule(config: TidalConfig, geometry: Geometry) -> LayerSchedule:
    profile = _resolve_profile(config, geometry)
    if profile is not None:
        return profile.schedule()
    logger.warning(
        "TIDAL_DECODE has no profile for this model: layers 0-%d dense, then every %dth an "
        "anchor. That is slow and not calibrated; run: vllm-ext profile MODEL",
        FALLBACK_DENSE_LAYERS - 1,
        FALLBACK_ANCHOR_STRIDE,
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
    make_selector=TidalSelector,
    capabilities=Capabilities(
        reads="everything in dense and anchor layers, budget_tokens in the others; decode only",
        frees="nothing",
        limits="needs a calibrated profile (vllm-ext profile); short contexts gain nothing",
    ),
    takes_row_options=True,
)
