"""The report's figures, as SVG text; matplotlib is imported only here."""

from __future__ import annotations

import io
from typing import Any

from deploy.loadtest.crossover import tpot_ratios

_MARKERS = "osD^vPX*"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: small, and searchable
    matplotlib.rcParams["svg.hashsalt"] = "vllm-ext"  # the same figures give the same bytes
    from matplotlib import pyplot

    return pyplot


def _svg(pyplot: Any, figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()


def _colors(result: dict[str, Any]) -> dict[str, str]:
    return {arm: f"C{number}" for number, arm in enumerate(result["arms"])}


def crossover_svg(result: dict[str, Any]) -> str:
    """TPOT over the first arm's, against the prompt length: below 1 the arm is faster.

    Hollow where all its rows were served dense.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    first, colors = next(iter(result["arms"])), _colors(result)
    groups = sorted({group for group, _ in tpot_ratios(result)})
    lengths = set()
    for (group, arm), points in tpot_ratios(result).items():
        workload, output_tokens, concurrency = group
        lengths |= {point.prompt_tokens for point in points}
        axes.plot(
            [point.prompt_tokens for point in points],
            [point.ratio for point in points],
            color=colors[arm],
            marker=_MARKERS[groups.index(group) % len(_MARKERS)],
            linestyle="-" if concurrency > 1 else "--",
            label=f"{arm}, {workload}, {output_tokens} out, {concurrency} at once",
        )
        idle = [point for point in points if not point.is_active]
        axes.plot(
            [point.prompt_tokens for point in idle],
            [point.ratio for point in idle],
            color=colors[arm],
            marker=_MARKERS[groups.index(group) % len(_MARKERS)],
            markerfacecolor="white",
            linestyle="none",
        )
    axes.axhline(1, color="grey", linewidth=1)
    axes.text(0.01, 1, f" {first}", transform=axes.get_yaxis_transform(), va="bottom", color="grey")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.set(xlabel="prompt, tokens", ylabel=f"median TPOT / that of {first}", ylim=(0, None))
    axes.grid(alpha=0.3)
    if lengths:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _svg(pyplot, figure)


def throughput_svg(result: dict[str, Any]) -> str:
    """Output throughput against latency, one panel per workload and prompt length.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    good = [record for record in result["cells"] if not record["failure"]]
    panels = sorted({(r["cell"]["workload"], r["cell"]["prompt_tokens"]) for r in good})
    columns = max(1, min(3, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for (workload, prompt), axes in zip(panels, grid.flat, strict=False):
        axes.set_title(f"{workload}, {prompt:,} tokens", fontsize=10)
        axes.set(xlabel="output tokens per second", ylabel="median E2E, seconds")
        cells = [
            r
            for r in good
            if (r["cell"]["workload"], r["cell"]["prompt_tokens"]) == (workload, prompt)
        ]
        _throughput_lines(axes, cells, _colors(result))
        axes.margins(0.15)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return _svg(pyplot, figure)


def _throughput_lines(axes: Any, records: list[dict[str, Any]], colors: dict[str, str]) -> None:
    """A line per arm and output length over its concurrencies, each point named by it."""
    outputs = sorted({record["cell"]["output_tokens"] for record in records})
    for arm, color in colors.items():
        for number, output_tokens in enumerate(outputs):
            points = sorted(
                (r["cell"]["concurrency"], r["output_tokens_per_s"], r["latency_ms"]["e2el"]["p50"])
                for r in records
                if r["arm"] == arm
                and r["cell"]["output_tokens"] == output_tokens
                and r["latency_ms"]["e2el"]["p50"] is not None
            )
            if not points:
                continue
            _, throughput, latency_ms = zip(*points, strict=True)
            latency_s = [value / 1000 for value in latency_ms]
            label = arm if len(outputs) == 1 else f"{arm}, {output_tokens} out"
            marker = _MARKERS[number % len(_MARKERS)]
            axes.plot(throughput, latency_s, marker=marker, color=color, label=label)
            for (concurrency, *_), x, y in zip(points, throughput, latency_s, strict=True):
                axes.annotate(
                    str(concurrency), (x, y), (4, 4), textcoords="offset points", fontsize=8
                )
