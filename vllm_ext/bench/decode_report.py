"""What ``vllm-ext bench decode`` makes of its measurements: a table and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_ext.bench.machine import versions
from vllm_ext.plotting import pyplot_if_installed

HEADINGS = (
    "requests x context", "arm", "TPOT ms (median)", "TPOT / first arm (median)", "spread",
    "first arm / this",
)  # fmt: skip
ACCEPTED = "drafts accepted, by position"
TTFT_HEADINGS = ("TTFT ms (median)", "least to most", "TTFT / first arm (median)")


def markdown(result: dict[str, Any]) -> str:
    """The result of ``decode.run`` as a Markdown table."""
    arms = [arm for cell in result["cells"] for arm in cell["arms"].values()]
    headings = HEADINGS + ((ACCEPTED,) if any("accepted" in arm for arm in arms) else ())
    headings += TTFT_HEADINGS if any("ttft_ms" in arm for arm in arms) else ()
    lines = [_about(result), "", _line(headings), "|" + "---|" * len(headings)]
    lines += [
        _line([f"{cell['batch']} x {cell['context_tokens']}", name, *_figures(arm, headings)])
        for cell in result["cells"]
        for name, arm in cell["arms"].items()
    ]
    return "\n".join(lines)


def _about(result: dict[str, Any]) -> str:
    work, info = result["workload"], result["machine"]
    order = "alternating rounds" if result["alternated"] else "rounds, one arm after another"
    parts = [Path(work["model"]).name, f"{work['rounds']} {order}", work["dtype"]]
    if work["compilation_config"] is not None:
        parts.append(f"compilation config `{json.dumps(work['compilation_config'])}`")
    else:
        parts.append("eager" if work["is_eager"] else "compiled")
    parts += [f"{name} {value}" for name, value in result["settings"].items()]
    parts += [info["cpu"], versions(info), f"GPU: {info['gpu']}"]
    contexts = "texts" if work["is_text"] else "random contexts"
    return f"Decode, distinct {contexts}, {', '.join(parts)}."


def _figures(arm: dict[str, Any], headings: tuple[str, ...]) -> list[str]:
    cells = [
        _ms(arm["tpot_ms_median"]),
        f"{arm['ratio_median']:.3f}",
        f"{arm['ratio_min']:.3f} to {arm['ratio_max']:.3f}",
        f"{1 / arm['ratio_median']:.2f}",
    ]
    if ACCEPTED in headings:
        cells += [" ".join(f"{share:.2f}" for share in arm.get("accepted", ())) or "-"]
    if "ttft_ms" in arm:
        cells += [_ms(arm["ttft_ms_median"])]
        cells += [f"{_ms(min(arm['ttft_ms']))} to {_ms(max(arm['ttft_ms']))}"]
        cells += [f"{arm['ttft_ratio_median']:.3f}"]
    return cells


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def plot(result: dict[str, Any], path: Path) -> bool:
    """Draws the speed-up over the first arm against the context: where it pays and where not.

    Returns:
        False when matplotlib is not installed, or there is only one context to show.
    """
    cells = result["cells"]
    if len({cell["context_tokens"] for cell in cells}) < 2:
        return False
    pyplot = pyplot_if_installed()
    if pyplot is None:
        return False

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=120)
    first, *others = cells[0]["arms"]
    for batch in sorted({cell["batch"] for cell in cells}):
        row = sorted((c for c in cells if c["batch"] == batch), key=lambda c: c["context_tokens"])
        contexts = [cell["context_tokens"] for cell in row]
        for name in others:
            arms = [cell["arms"][name] for cell in row]
            middle = [1 / arm["ratio_median"] for arm in arms]
            spread = [
                [m - 1 / arm["ratio_max"] for m, arm in zip(middle, arms, strict=True)],
                [1 / arm["ratio_min"] - m for m, arm in zip(middle, arms, strict=True)],
            ]
            label = f"{name}, {batch} at once"
            axes.errorbar(contexts, middle, yerr=spread, marker="o", capsize=3, label=label)
    axes.axhline(1, color="grey", linestyle="--", label=first)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({cell["context_tokens"] for cell in cells}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="context, tokens", ylabel=f"TPOT of {first} / TPOT", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True
