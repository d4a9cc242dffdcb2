"""The evaluation for people: Markdown table and plots."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_ext.evaluation.run import DENSE
from vllm_ext.plotting import pyplot_if_installed


def summary(evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per column: needle accuracy in all and by kind, mean KL and top-1 agreement.

    Args:
        evaluation: ``columns``, ``needles`` and ``texts`` as the command writes them.
    """
    result: dict[str, dict[str, Any]] = {}
    for column in evaluation["columns"]:
        scores: dict[str, list[float]] = {}
        for needle in evaluation["needles"]:
            scores.setdefault(needle["kind"], []).append(needle["scores"][column])
        everything = [score for kind in scores.values() for score in kind]
        steps = evaluation["texts"].get(column)
        result[column] = {
            "needles": fmean(everything) if everything else None,
            "by_kind": {kind: fmean(values) for kind, values in scores.items()},
            "kl": fmean(steps["kl"]) if steps else None,
            "agreement": fmean(steps["agrees"]) if steps else None,
        }
    return result


BIN_TOKENS = 512


def nll_by_position(scores: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    """Mean negative log-likelihood of texts' tokens, in bins of ``BIN_TOKENS`` positions.

    Args:
        scores: log-probabilities by column and text.
    """
    result = {}
    for column, texts in scores.items():
        longest = max((len(text) for text in texts), default=0)
        bins = range(0, longest - BIN_TOKENS // 2, BIN_TOKENS)
        result[column] = [
            -fmean(value for text in texts for value in text[first : first + BIN_TOKENS])
            for first in bins
        ]
    return {column: values for column, values in result.items() if values}


def _cell(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def markdown(evaluation: dict[str, Any]) -> str:
    """One row per column of the evaluation."""
    columns = summary(evaluation)
    kinds = list(next(iter(columns.values()))["by_kind"])
    work, machine = evaluation["workload"], evaluation["machine"]
    lines = [
        f"Fidelity to dense of {Path(work['model']).name}: {len(evaluation['needles'])} needle "
        f"prompts ({work['lengths_tokens']} tokens x depths {work['depths']}), "
        f"{work['text_prompts']} texts of {work['text_tokens']} tokens x {work['text_steps']} "
        f"steps along dense's tokens, seed {work['seed']}, {work['dtype']}; vLLM "
        f"{machine['vllm']}, {machine['cpu']}, GPU: {machine['gpu']}.",
        "",
        "| | needles | " + "".join(f"{kind} | " for kind in kinds) + "KL | top-1 |",
        "|---|---|" + "---|" * len(kinds) + "---|---|",
    ]
    for name, figures in columns.items():
        cells = [_cell(figures["needles"], ".1%")]
        cells += [_cell(figures["by_kind"][kind], ".1%") for kind in kinds]
        cells += [_cell(figures["kl"], ".4f"), _cell(figures["agreement"], ".1%")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _budget_of(column: str) -> tuple[str, int] | None:
    method, _, budget = column.partition("@")
    return (method, int(budget)) if budget else None


def plots(evaluation: dict[str, Any], prefix: Path) -> list[Path]:
    """Accuracy and KL against budget, and a depth x length map of the first method.

    Returns:
        The PNGs written; none when matplotlib is not installed.
    """
    if pyplot_if_installed() is None:
        return []
    written = []
    if evaluation["needles"] or any(evaluation["texts"].values()):
        written.append(prefix.with_name(prefix.name + "-budget.png"))
        _plot_budgets(evaluation, written[-1])
    if evaluation["nll_by_position"]:
        written.append(prefix.with_name(prefix.name + "-position.png"))
        _plot_positions(evaluation["nll_by_position"], written[-1])
    if evaluation["needles"]:
        written.append(prefix.with_name(prefix.name + "-depth.png"))
        _plot_depths(evaluation, written[-1])
    return written


_BUDGET_PANELS: dict[str, dict[str, Any]] = {
    "needles": {"title": "needles", "ylabel": "found", "ylim": (0, 1.05)},
    "kl": {"title": "natural text", "ylabel": "mean KL to dense", "yscale": "log"},
}


def _plot_budgets(evaluation: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    columns = summary(evaluation)
    curves: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for name, figures in columns.items():
        split = _budget_of(name)
        if split is not None:
            curves.setdefault(split[0], []).append((split[1], figures))
    measured = [key for key in ("needles", "kl") if columns[DENSE][key] is not None]
    figure, panels = pyplot.subplots(
        1, len(measured), figsize=(5 * len(measured), 4), dpi=120, squeeze=False
    )
    for key, panel in zip(measured, panels[0], strict=True):
        for method, points in curves.items():
            budgets, values = zip(*((b, f[key]) for b, f in points), strict=True)
            panel.plot(budgets, values, marker="o", label=method)
        panel.set(xlabel="budget, tokens per KV head", **_BUDGET_PANELS[key])
        panel.grid(alpha=0.3)
        if key == "needles":
            panel.axhline(columns[DENSE][key], color="grey", linestyle="--", label="dense")
        if panel.lines:
            panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _plot_positions(curves: dict[str, list[float]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for column, values in curves.items():
        middles = [(index + 0.5) * BIN_TOKENS for index in range(len(values))]
        axes.plot(middles, values, marker="o", label=column)
    axes.set(title="reading a long text", xlabel="position, tokens", ylabel="nats per token")
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _plot_depths(evaluation: dict[str, Any], path: Path) -> None:
    import numpy
    from matplotlib import pyplot

    needles = evaluation["needles"]
    lengths = sorted({needle["length_tokens"] for needle in needles})
    depths = sorted({needle["depth"] for needle in needles})
    shown = evaluation["columns"][:4]
    figure, panels = pyplot.subplots(
        1, len(shown), figsize=(3 * len(shown) + 1, 3.6), dpi=120, squeeze=False, sharey=True
    )
    for axes, column in zip(panels[0], shown, strict=True):
        grid = numpy.full((len(depths), len(lengths)), numpy.nan)
        for row, depth in enumerate(depths):
            for place, length in enumerate(lengths):
                cell = [
                    needle["scores"][column]
                    for needle in needles
                    if (needle["depth"], needle["length_tokens"]) == (depth, length)
                ]
                if cell:
                    grid[row, place] = fmean(cell)
                    axes.text(place, row, f"{fmean(cell):.0%}", ha="center", va="center", size=7)
        axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(column, fontsize=9)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("length, tokens")
    panels[0][0].set_ylabel("depth of the needle")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
