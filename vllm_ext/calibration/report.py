"""What a calibration found, for people: a heat map and a short Markdown report."""

from __future__ import annotations

from pathlib import Path

import torch

from attn_backends.profile import Profile


def heat_map(profile: Profile, layers: torch.Tensor, path: Path) -> bool:
    """Draws how much of each layer's mass the others' selections recover.

    Args:
        profile: the result; its anchors are marked.
        layers: ``[num_layers a, num_layers b]`` similarity.
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
    image = axes.imshow(layers.numpy(), vmin=0, vmax=1, cmap="viridis", origin="lower")
    figure.colorbar(image, label="recovered share of attention mass (worst position)")
    for layer in profile.anchor_layers:
        axes.axhline(layer, color="white", linewidth=0.8, linestyle="--")
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
        "| anchors | KL text | KL retrieval | top-1 agreement |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {verdict['anchors']} | {verdict['kl_text']:.4f} | {verdict['kl_retrieval']:.4f} "
        f"| {verdict['agreement']:.3f} |"
        for verdict in calibration["verdicts"]
    ]
    lines += [
        "",
        "KL divergence and top-1 agreement of next-token distributions against dense, under forced "
        "decoding of each prompt's last tokens (transformers, fp32).",
    ]
    if image is not None:
        lines += ["", f"![similarity of layers]({image.name})"]
    return "\n".join(lines) + "\n"
