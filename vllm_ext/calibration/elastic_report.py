"""What a calibration of MOA found, for people: a map of spans and a short Markdown report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attn_backends.methods.moa import METHOD as MOA
from attn_backends.profile import Profile
from kvcache.spans import Span
from vllm_ext.calibration.assignment import density_of
from vllm_ext.plotting import pyplot_if_installed


def span_map(profile: Profile, shown: dict[str, Any], path: Path) -> bool:
    """Draws what share of the longest calibrated prompt each KV head keeps.

    Args:
        profile: the result.
        shown: what ``Calibration.run`` returned beside it.
        path: PNG to write.

    Returns:
        False when matplotlib is not installed.
    """
    pyplot = pyplot_if_installed()
    if pyplot is None:
        return False

    num_tokens = profile.calibration[MOA.name]["context_tokens"]
    kept = [density_of(span, num_tokens) for span in shown["spans"]]
    heads = profile.num_kv_heads
    rows = [kept[head::heads] for head in range(heads)]
    figure, (axes, curve) = pyplot.subplots(
        2, 1, figsize=(9, 6), dpi=120, height_ratios=(1, 1.4), layout="constrained"
    )
    image = axes.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    figure.colorbar(image, label="share kept")
    axes.set_yticks(range(heads))
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head")
    axes.set_title(f"{profile.model}: what each KV head keeps of {num_tokens:,} tokens")
    densities, influence = zip(*shown["curve"], strict=True)
    curve.plot(densities, influence, marker="o")
    curve.axvline(profile.calibration[MOA.name]["density"], color="crimson", linestyle="--")
    curve.set_ylim(bottom=0)
    curve.set_xlabel("density: share of the tokens that heads keep on average (dashed: chosen)")
    curve.set_ylabel("influence of what is hidden")
    figure.savefig(path)
    pyplot.close(figure)
    return True


def markdown(profile: Profile, shown: dict[str, Any], image: Path | None) -> str:
    """The report's text: classes, plans and the curve."""
    found, num_heads = profile.calibration[MOA.name], profile.num_layers * profile.num_kv_heads
    spans: list[Span] = shown["spans"]
    lines = [
        f"# What the KV heads of {profile.model} see",
        "",
        f"Prompts of up to {found['context_tokens']} tokens, {found['examples']} of retrieval and "
        f"of text each at three lengths, seed {found['seed']}; at most {found['density']:.0%} of "
        "the longest prompt's tokens kept, on average over the heads.",
        "",
        "| class | sinks | least span | alpha | beta | KV heads | kept of "
        + " | kept of ".join(f"{n} tokens" for n in found["density_at"])
        + " |",
        "|" + "---|" * (6 + len(found["density_at"])),
    ]
    for span in sorted({*spans}, key=lambda one: (one.beta_64ths, one.alpha_tokens)):
        shares = " | ".join(f"{density_of(span, int(n)):.0%}" for n in found["density_at"])
        number = sum(one == span for one in spans)
        lines.append(
            f"| {'full' if span.hides_nothing else 'elastic'} | {span.sink_tokens} "
            f"| {span.floor_tokens} | {span.alpha_tokens} | {span.beta_64ths}/64 | {number} "
            f"| {shares} |"
        )
    mean = " | ".join(f"{share:.1%}" for share in found["density_at"].values())
    lines += [
        f"| all | | | | | {num_heads} | {mean} |",
        "",
        f"Plans, on prompts of {found['validated_tokens']} tokens that chose nothing; the one of "
        f"the least divergence ({found['aim']}) is in the profile:",
        "",
        "| plan | KL text | KL retrieval | top-1 retrieval |",
        "|---|---|---|---|",
        *(
            f"| {plan['aim']} | {plan['kl_text']:.4f} | {plan['kl_retrieval']:.4f} "
            f"| {plan['agreement_retrieval']:.1%} |"
            for plan in shown["plans"]
        ),
        "",
        "KL divergence from dense at the answers to six questions about each prompt of needles "
        "and at three places of each text (transformers, fp32; spans hold in prefill, too).",
        "",
        "What other budgets would hide at best, by the same measure of influence (all lengths):",
        "",
        "| density | " + " | ".join(f"{share:.0%}" for share, _ in shown["curve"]) + " |",
        "|---|" + "---|" * len(shown["curve"]),
        "| influence | " + " | ".join(f"{cost:.3f}" for _, cost in shown["curve"]) + " |",
    ]
    if image is not None:
        lines += ["", f"![spans of the KV heads]({image.name})"]
    return "\n".join(lines) + "\n"
