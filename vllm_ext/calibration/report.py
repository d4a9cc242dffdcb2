"""What a calibration found, for people: a heat map and a short Markdown report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attn_backends.profile import Profile


def heat_map(profile: Profile, costs: torch.Tensor, path: Path) -> bool:
    """Draws what it costs each layer to read what another one selects.

    Args:
        profile: the result; its anchors are marked.
        costs: ``[num_layers a, num_layers b]`` relative errors, infinite for ``a`` after ``b``.
        path: PNG to write.

    Returns:
        False when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 6), dpi=120)
    shown = costs.where(costs.isfinite(), torch.tensor(torch.nan)).clamp_min(1e-6)
    image = axes.imshow(shown.numpy(), norm="log", cmap="viridis_r", origin="lower")
    figure.colorbar(image, label="relative error of the residual stream (squared)")
    for layer in profile.anchor_layers:
        axes.axhline(layer, color="crimson", linewidth=0.8, linestyle="--")
    axes.set_yticks(profile.anchor_layers)
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
    calibration = profile.calibration
    lines = [
        f"# Calibration of {profile.model}",
        "",
        f"Budget {calibration['budget_tokens']} tokens in blocks of {calibration['block_size']}, "
        f"prompts of up to {calibration['context_tokens']} tokens, {calibration['examples']} of "
        f"retrieval and of text each, seed {calibration['seed']}.",
        "",
        f"Dense layers {profile.dense_layers}, anchors {profile.anchor_layers}, "
        f"{len(profile.head_maps)} layers with a head map of their own.",
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
        "decoding of each prompt's last tokens (transformers, fp32).",
    ]
    if image is not None:
        lines += ["", f"![similarity of layers]({image.name})"]
    return "\n".join(lines) + "\n"


_HEADER = "| KL text | KL retrieval | top-1 text | top-1 retrieval |\n|---|---|---|---|---|"


def _row(verdict: dict[str, Any]) -> str:
    return (
        f"| {verdict['kl_text']:.4f} | {verdict['kl_retrieval']:.4f} "
        f"| {verdict['agreement_text']:.1%} | {verdict['agreement_retrieval']:.1%} |"
    )
