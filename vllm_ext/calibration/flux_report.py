"""What a calibration of FLUX found, for people: a plot of routes and a short Markdown report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ext.calibration.flux import FluxSettings, Found
from vllm_ext.calibration.flux_section import Decision, served_static
from vllm_ext.calibration.routed_prompts import KINDS
from vllm_ext.calibration.routers import RETRIEVAL_WEIGHT
from vllm_ext.calibration.routing_fit import interval, oracle_depths
from vllm_ext.calibration.routing_outcomes import Outcome, by_kind, interval_text, mean_known
from vllm_ext.plotting import pyplot_if_installed

HEADER = (
    "| in answers | full layers (retrieval / text / instruction) | KL [95%] | KL by kind "
    "| KL minus static at that share [95%] | top-1 | needles [95%] |\n|---|---|---|---|---|---|---|"
)


def route_plot(title: str, settings: FluxSettings, found: Found, path: Path) -> bool:
    """Draws the routes of each kind of prompt, and divergence by share.

    Args:
        title: the model's name.
        settings: of the calibration.
        found: by it.
        path: PNG to write.

    Returns:
        False when matplotlib is not installed.
    """
    pyplot = pyplot_if_installed()
    if pyplot is None:
        return False

    figure, (routes, curve) = pyplot.subplots(1, 2, figsize=(11, 4), dpi=120, layout="constrained")
    _draw_routes(routes, title, found)
    variants = found.held_out.variants
    # All layers full is zero, which a logarithm has no place for.
    shares, kl = variants.masks.mean(1)[:-1], variants.kl.mean(0)[:-1]
    curve.plot(shares, kl, label="static, best layers")
    curve.plot(found.lazy.masks.mean((0, 2)), found.lazy.kl.mean(0), marker=".", label="lazy test")
    if found.fits:
        curve.plot(
            found.routed.share.mean(), found.routed.kl.mean(), "*", markersize=12, label="router"
        )
    curve.axvline(settings.share, color="grey", linestyle="--", linewidth=0.8)
    curve.set_yscale("log")
    curve.set_xlabel("share of full layers (dashed: asked for)")
    curve.set_ylabel("KL to dense, held-out prompts")
    curve.legend()
    figure.savefig(path)
    pyplot.close(figure)
    return True


def _draw_routes(axes: Any, title: str, found: Found) -> None:
    """Bars of depths, one for each kind of prompt."""
    axes.set_title(f"{title}: routes of the held-out prompts")
    if not found.fits:
        axes.text(0.5, 0.5, "nothing is routed", ha="center")
        return
    bottom = np.zeros(len(KINDS))
    for depth, number in enumerate(found.fits[0].split.numbers()):
        part = np.array(by_kind((found.depths == depth).astype(float), found.held_out.kinds))
        axes.bar(KINDS, part, bottom=bottom, label=f"{number} of {len(found.order)} layers full")
        bottom += part
    axes.set_ylabel("share of the prompts")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)


def markdown(
    title: str, settings: FluxSettings, found: Found, decision: Decision, image: Path | None
) -> str:
    """The report's text.

    Args:
        title: the model's name.
        settings: of the calibration.
        found: by it.
        decision: what the profile serves.
        image: the plot, if there is one.
    """
    lengths = sorted(
        {int(n) for n in (found.held_out.num_tokens.min(), found.held_out.num_tokens.max())}
    )
    lines = [
        f"# Which layers of {title} read everything",
        "",
        f"Prompts are read densely; in answers a sparse layer sees {settings.sink_tokens} sinks "
        f"and the last {settings.window_tokens} tokens. {len(found.fitted.kinds)} prompts of up to "
        f"{settings.context_tokens} tokens were fitted, {settings.order_prompts} of them ordered "
        f"the layers; the table is of {len(found.held_out.kinds)} others, of "
        f"{' to '.join(f'{n:,}' for n in lengths)} tokens: thirds of retrieval, text and "
        f"instructions, seed {settings.seed}.",
        "",
        f"**In the profile: {'routes by request' if decision.is_routed else 'static layers'}.** "
        f"{decision.reason[0].upper()}{decision.reason[1:]}.",
        "",
        f"Layers, the most needed first: {', '.join(map(str, found.order))}.",
        "",
        "## Held out",
        "",
        HEADER,
        *_rows(settings, found),
        "",
        "KL divergence from dense on dense's own answers, in nats, and how often both think the "
        "same token likeliest (transformers, fp32); needles by greedy decoding under the routes; "
        "bootstrap intervals over the prompts. *Static*: the first layers of the order, for every "
        "request (at a share between two numbers of layers a mixture of both). *Lazy test*: a "
        "layer is full if its last query puts enough mass into the gap; nothing is trained. "
        "*Hindsight*: the best depth of each request at that mean share, which nobody knows "
        "beforehand.",
        *_routers(found),
    ]
    if image is not None:
        lines += ["", f"![routes by kind of prompt]({image.name})"]
    return "\n".join(lines) + "\n"


def _rows(settings: FluxSettings, found: Found) -> Iterator[str]:
    variants = found.held_out.variants
    dense = variants.pick(np.full(len(variants.kl), variants.kl.shape[1] - 1))
    yield _row("dense", dense, found)
    served = served_static(found, settings.share)
    if found.fits:
        share = float(found.routed.share.mean())
        yield _row("router", found.routed, found)
        yield _row("static, at the router's share", found.static, found)
        yield _row("lazy test, at the router's share", found.lazy.between(share), found)
        nested = found.held_out.nested(found.fits[0].split.numbers())
        best = oracle_depths(nested.kl, nested.masks.mean(1), share)
        yield _row("hindsight, the router's groups", nested.pick(best), found)
    number = round(float(served.share.mean()) * len(found.order))
    yield _row(f"static, {number} layers (unpadded KV groups)", served, found)
    if not found.fits:
        yield _row("lazy test", found.lazy.between(settings.share), found)


def _row(name: str, outcome: Outcome, found: Found) -> str:
    kinds = found.held_out.kinds
    static = found.held_out.variants.between(float(outcome.share.mean()))
    change = outcome.kl - static.kl
    hits = outcome.hits[~np.isnan(outcome.hits)]
    low, high = interval(hits) if len(hits) else (float("nan"),) * 2
    cells = (
        name,
        f"{outcome.share.mean():.3f} ({_joined(by_kind(outcome.share, kinds), 2)})",
        f"{outcome.kl.mean():.4f} {interval_text(outcome.kl)}",
        _joined(by_kind(outcome.kl, kinds), 4),
        f"{change.mean():+.4f} {interval_text(change)}",
        f"{outcome.agreement.mean():.3f}",
        f"{mean_known(outcome.hits):.3f} [{low:.3f}, {high:.3f}]",
    )
    return "| " + " | ".join(cells) + " |"


def _routers(found: Found) -> list[str]:
    """The parts of the order, and how the routers were chosen."""
    if not found.fits:
        return []
    split, kinds = found.fits[0].split, found.held_out.kinds
    router = found.fits[0].router(len(found.order))
    lines = [
        "",
        "## Routes",
        "",
        "| layers | are full (retrieval / text / instruction) |",
        "|---|---|",
        f"| {_named(found.order[: split.num_full])} | always |",
    ]
    for depth, group in enumerate(split.groups(found.order), 1):
        full = by_kind((found.depths >= depth).astype(float), kinds)
        lines.append(f"| {_named(group)} | {_joined(full, 2)} |")
    lines += [
        f"| {_named(found.order[split.numbers()[-1] :])} | never |",
        "",
        f"Evidence is read in layers {_named(router.witnesses)}.",
        "",
        "How they were fitted, by folds of the fitted prompts; the first is the router above. "
        "*Joint*: all groups together, by the KL that their depths leave at the share, "
        f"{RETRIEVAL_WEIGHT:g} times where keys are asked for; "
        "*logistic*: each group by whether its absence is seen in the answer.",
        "",
        "| fit | always full, routed | share | KL in folds | static at that share |",
        "|---|---|---|---|---|",
    ]
    for fit in found.fits:
        share = float(fit.folds.share.mean())
        static = found.fitted.variants.between(share).kl.mean()
        lines.append(
            f"| {fit.kind} | {fit.split.num_full}, {' + '.join(map(str, fit.split.sizes))} "
            f"| {share:.3f} | {fit.folds.kl.mean():.4f} | {static:.4f} |"
        )
    return lines


def _named(layers: list[int]) -> str:
    return ", ".join(map(str, sorted(layers)))


def _joined(figures: list[float], digits: int) -> str:
    return " / ".join(f"{figure:.{digits}f}" for figure in figures)
