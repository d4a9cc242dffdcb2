"""What a calibration found, for people: a heat map and a short Markdown report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attn_backends.methods.sink_window import METHOD as SINK_WINDOW
from attn_backends.methods.sink_window import WindowSection
from attn_backends.methods.tidal_decode import METHOD as TIDAL_DECODE
from attn_backends.methods.tidal_decode import AnchorSection
from attn_backends.profile import Profile
from vllm_ext.calibration.search import Verdict
from vllm_ext.plotting import pyplot_if_installed


def verdict_line(name: str, verdict: Verdict) -> str:
    """A verdict in one line."""
    return (
        f"{name}: KL text {verdict.kl_text:.4f}, retrieval {verdict.kl_retrieval:.4f}; top-1 "
        f"text {verdict.agreement_text:.1%}, retrieval {verdict.agreement_retrieval:.1%}"
    )


def heat_map(profile: Profile, costs: torch.Tensor, path: Path) -> bool:
    """Draws what it costs each layer to read what another one selects.

    Args:
        profile: the result; its anchors are marked.
        costs: ``[num_layers a, num_layers b]`` relative errors, infinite for ``a`` after ``b``.
        path: PNG to write.

    Returns:
        False when matplotlib is not installed.
    """
    pyplot = pyplot_if_installed()
    if pyplot is None:
        return False

    figure, axes = pyplot.subplots(figsize=(7, 6), dpi=120)
    shown = costs.where(costs.isfinite(), torch.tensor(torch.nan)).clamp_min(1e-6)
    image = axes.imshow(shown.numpy(), norm="log", cmap="viridis_r", origin="lower")
    figure.colorbar(image, label="relative error of the residual stream (squared)")
    anchors = _anchors(profile).anchor_layers
    for layer in anchors:
        axes.axhline(layer, color="crimson", linewidth=0.8, linestyle="--")
    axes.set_yticks(anchors)
    axes.set_xlabel("layer that reads the selection")
    axes.set_ylabel("layer that selects (anchors marked)")
    budget_tokens = profile.calibration["budget_tokens"]
    axes.set_title(f"{profile.model}, {budget_tokens} tokens per KV head")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True


def markdown(profile: Profile, image: Path | None) -> str:
    """The report's text: the choice, and the best verified alternatives."""
    calibration, section = profile.calibration, _anchors(profile)
    lines = [
        f"# Calibration of {profile.model}",
        "",
        f"Budget {calibration['budget_tokens']} tokens in blocks of {calibration['block_size']}, "
        f"prompts of up to {calibration['context_tokens']} tokens, {calibration['examples']} of "
        f"retrieval and of text each, seed {calibration['seed']}.",
        "",
        f"Dense layers {section.dense_layers}, anchors {section.anchor_layers}, "
        f"{len(section.head_maps)} layers with a head map of their own.",
        "",
        "Prompts that chose nothing:",
        "",
        "| budget, tokens " + _HEADER,
        *(f"| {budget} {_row(verdict)}" for budget, verdict in calibration["held_out"].items()),
        "",
        "The best of the anchor sets that were tried, on the prompts that chose among them:",
        "",
        "| anchors " + _HEADER,
        *(f"| {verdict['anchors']} {_row(verdict)}" for verdict in calibration["verdicts"]),
        "",
        "KL divergence and top-1 agreement of next-token distributions against dense, under forced "
        "decoding of each prompt's last tokens (transformers, fp32; anchors attend what they "
        "select).",
        *_layers(profile),
        *_sinks(profile),
    ]
    if image is not None:
        lines += ["", f"![similarity of layers]({image.name})"]
    return "\n".join(lines) + "\n"


def _layers(profile: Profile) -> list[str]:
    """LLM-Drop's table, least S first."""
    if profile.findings is None:
        return []
    similarity = profile.findings.layer_similarity
    ranked = sorted(range(len(similarity)), key=lambda layer: similarity[layer])
    lines = [
        "",
        "## Layers whose attention changes least",
        "",
        "S = 1 - cos(X, X + Attn(LN(X))), mean over tokens. Cosines do not see rare retrieval: "
        "judge what dropping costs by the KL above.",
        "",
        "| layer | " + " | ".join(str(layer) for layer in ranked[:10]) + " |",
        "|---|" + "---|" * len(ranked[:10]),
        "| S | " + " | ".join(f"{similarity[layer]:.4f}" for layer in ranked[:10]) + " |",
    ]
    if dropped := _anchors(profile).drop_layers:
        lines += ["", f"Dropped: {dropped}. The KL above includes it."]
    if windowed := _windowed(profile):
        lines += ["", f"Windowed instead: {windowed}. The KL above is without it."]
    return lines


def _anchors(profile: Profile) -> AnchorSection:
    return profile.section(TIDAL_DECODE.name, AnchorSection)


def _windowed(profile: Profile) -> list[int]:
    """Layers with SINK_WINDOW's window, where the profile lets others keep everything."""
    if SINK_WINDOW.name not in profile.methods:
        return []
    section = profile.section(SINK_WINDOW.name, WindowSection)
    other = {*section.full_layers, *section.drop_layers}
    return [i for i in range(profile.num_layers) if i not in other] if section.full_layers else []


def _sinks(profile: Profile) -> list[str]:
    if profile.findings is None:
        return []
    sinks = profile.findings.sinks
    lines = ["", "## Attention sinks", ""]
    if sinks is None:
        return [*lines, f"Not looked for: {profile.findings.sinks_off_reason}."]
    num_heads = len(sinks.head_sink_mass) * profile.num_kv_heads
    positions = range(min(8, len(sinks.sink_rate)))
    lines += [
        f"First tokens that are sinks (attention above {sinks.epsilon} in 1% of the heads, in "
        f"most prompts): **{sinks.needed_tokens}**.",
        "",
        "| position | " + " | ".join(map(str, positions)) + " |",
        "|---|" + "---|" * len(positions),
        "| heads | " + " | ".join(f"{sinks.sink_rate[k]:.1%}" for k in positions) + " |",
        "",
        "| first tokens | " + " | ".join(map(str, sinks.first_mass)) + " |",
        "|---|" + "---|" * len(sinks.first_mass),
        "| attention of late queries | "
        + " | ".join(f"{mass:.3f}" for mass in sinks.first_mass.values())
        + " |",
        "",
        f"Dormant KV heads (sink mass above 0.9, small values): {len(sinks.dormant_heads)} of "
        f"{num_heads}: {sinks.dormant_heads[:20]}.",
        "",
    ]
    lines.append(
        f"Secondary sinks: {sinks.secondary_per_prompt} per prompt; in the layers that have any, "
        f"they get {sinks.secondary_mass:.1%} of the attention. `sink_tokens` does not keep them."
    )
    if sinks.secondary:
        lines += ["", "| prompt | position | layers | kind | attention |", "|---|---|---|---|---|"]
        lines += [
            f"| {s.prompt} | {s.position} | {s.first_layer}-{s.last_layer} | {s.kind} "
            f"| {s.attention:.4f} |"
            for s in sinks.secondary[:10]
        ]
    return lines


_HEADER = "| KL text | KL retrieval | top-1 text | top-1 retrieval |\n|---|---|---|---|---|"


def _row(verdict: dict[str, Any]) -> str:
    return (
        f"| {verdict['kl_text']:.4f} | {verdict['kl_retrieval']:.4f} "
        f"| {verdict['agreement_text']:.1%} | {verdict['agreement_retrieval']:.1%} |"
    )
