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
from dataclasses import dataclass
from pathlib import Path

from attn_backends.budget import BudgetConfig, BudgetSelector, prompts_cached
from attn_backends.method import Capabilities, Geometry, SparseMethod
from attn_backends.plan import LayerRole, LayerSchedule
from attn_backends.profile import Profile, load_profile, require_fit, shipped_profile

logger = logging.getLogger("vllm.vllm_ext")

FALLBACK_DENSE_LAYERS = 2
FALLBACK_ANCHOR_STRIDE = 2


@dataclass(frozen=True)
class TidalConfig(BudgetConfig):
    """Settings of TIDAL_DECODE.

    Attributes:
        profile: path of a profile, or ``auto`` for the one shipped for this model.
    """

    profile: str = "auto"


def _resolve_profile(config: TidalConfig, geometry: Geometry) -> Profile | None:
    if config.profile != "auto":
        profile = load_profile(Path(config.profile))
    else:
        found = shipped_profile(Path(geometry.model_path))
        if found is None:
            return None
        profile = found
    require_fit(profile, geometry.num_layers, geometry.num_kv_heads)
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
    make_selector=BudgetSelector,
    capabilities=Capabilities(
        reads="everything in dense and anchor layers, budget_tokens in the others; decode only",
        frees="nothing",
        limits="needs a calibrated profile (vllm-ext profile); short contexts gain nothing",
    ),
    takes_row_options=True,
    retention=prompts_cached,
)
