"""From what a calibration of FLUX found to what a profile says: routed or static, and why."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attn_backends.checkpoint import fingerprint, read_model_config
from attn_backends.methods.flux import METHOD as FLUX
from attn_backends.methods.flux import FluxSection
from attn_backends.profile import SCHEMA_VERSION, Profile
from vllm_ext.calibration.flux import FluxSettings, Found
from vllm_ext.calibration.layer_splits import static_layers
from vllm_ext.calibration.routed_attention import EVIDENCE_QUERIES
from vllm_ext.calibration.routers import RETRIEVAL_WEIGHT, Router
from vllm_ext.calibration.routing_fit import interval
from vllm_ext.calibration.routing_outcomes import Outcome, by_kind, mean_known

ROUTER_CHOICES = ("auto", "always", "never")
LEAST_JUDGES = 30  # held-out prompts: intervals of fewer are too narrow


@dataclass(frozen=True)
class Decision:
    """What the profile serves.

    Attributes:
        is_routed: by request; otherwise the same layers for all.
        reason: why, for people.
    """

    is_routed: bool
    reason: str


def decided(found: Found, choice: str) -> Decision:
    """Routers only where they are shown to be better on prompts that chose nothing, or asked for.

    Args:
        found: by the calibration.
        choice: of ``ROUTER_CHOICES``.
    """
    if not found.fits:
        return Decision(False, f"{len(found.order)} layers make too few equal groups to route")
    judges = found.held_out
    change = judges.costs_of(found.routed) - judges.costs_of(found.static)
    low, high = interval(change)
    text = (
        f"on {len(change)} held-out prompts the router's KL, {RETRIEVAL_WEIGHT:g} times where keys "
        f"are asked for, is {change.mean():+.4f} from that of the best layers for all requests at "
        f"the same share of {found.routed.share.mean():.2f}, 95% interval {low:+.4f} to {high:+.4f}"
    )
    if choice != "auto":
        return Decision(choice == "always", f"--router {choice}; {text}")
    if len(change) < LEAST_JUDGES:
        return Decision(False, f"{text}: too few prompts to judge, {LEAST_JUDGES} are enough")
    return Decision(high < 0, f"{text}: it is {'' if high < 0 else 'not '}shown to be better")


def served_static(found: Found, share: float) -> Outcome:
    """Held-out prompts under the layers that a profile without routes has."""
    number = static_layers(len(found.order), share)
    variants = found.held_out.variants
    return variants.pick(np.full(len(variants.kl), number))


def router_content(router: Router) -> bytes:
    """The file beside the profile, safetensors."""
    from safetensors.numpy import save

    tensors = {name: np.ascontiguousarray(part, np.float32) for name, part in vars(router).items()}
    return bytes(save(tensors))


def flux_profile(
    settings: FluxSettings, found: Found, decision: Decision, router_path: Path
) -> Profile:
    """A profile with FLUX's section, and the routers' file where it is routed.

    Args:
        settings: of the calibration.
        found: by it.
        decision: routed or not.
        router_path: file to write, in the profile's folder.
    """
    num_layers = len(found.order)
    parts: dict[str, Any] = {
        "full_layers": sorted(found.order[: static_layers(num_layers, settings.share)])
    }
    if decision.is_routed:
        fit = found.fits[0]
        content = router_content(fit.router(num_layers))
        router_path.parent.mkdir(parents=True, exist_ok=True)
        router_path.write_bytes(content)
        parts = {
            "full_layers": sorted(found.order[: fit.split.num_full]),
            "routed_groups": fit.split.groups(found.order),
            "router_file": router_path.name,
            "router_sha256": hashlib.sha256(content).hexdigest(),
        }
    section = FluxSection(
        sink_tokens=settings.sink_tokens,
        window_tokens=settings.window_tokens,
        evidence_tokens=EVIDENCE_QUERIES,
        **parts,
    )
    config = read_model_config(settings.model)
    return Profile(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint(settings.model),
        model=settings.model.name,
        num_layers=num_layers,
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        calibration={FLUX.name: _told(settings, found, decision)},
    ).with_section(FLUX.name, section)


def _told(settings: FluxSettings, found: Found, decision: Decision) -> dict[str, Any]:
    """How it was made, for people."""
    told: dict[str, Any] = {
        name: value.name if isinstance(value, Path) else value  # no folder of the user's
        for name, value in vars(settings).items()
    }
    told |= {"order": found.order, "decision": decision.reason, "held_out_figures": {}}
    outcomes = {"static": served_static(found, settings.share)}
    if found.fits:
        told["router"] = found.fits[0].kind
        outcomes |= {"router": found.routed, "static at the router's share": found.static}
    for name, outcome in outcomes.items():
        told["held_out_figures"][name] = {
            "share": _round(outcome.share.mean()),
            "share_by_kind": [_round(s) for s in by_kind(outcome.share, found.held_out.kinds)],
            "kl": _round(outcome.kl.mean()),
            "agreement": _round(outcome.agreement.mean()),
            "needles": _round(mean_known(outcome.hits)),
        }
    return told


def _round(figure: Any) -> float:
    return round(float(figure), 5)
