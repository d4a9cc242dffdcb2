"""The run for people: Markdown, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.loadtest import plots
from deploy.loadtest.client import LATENCIES
from deploy.loadtest.crossover import tpot_ratios, verdict
from deploy.loadtest.grid import WORKLOADS, Cell

Table = tuple[list[str], list[list[str]]]  # heading, rows
NONE = "–"  # noqa: RUF001 (a figure that there is not)


def _figure(value: float | None, form: str = ".0f") -> str:
    return NONE if value is None else format(value, form)


def _percentiles(record: dict[str, Any], name: str) -> str:
    values = record["latency_ms"][name]
    return " / ".join(_figure(values[key], ".0f") for key in ("p50", "p90", "p99"))


def _sorted_cells(result: dict[str, Any]) -> list[dict[str, Any]]:
    arms = list(result["arms"])
    workloads = list(WORKLOADS)

    def order(record: dict[str, Any]) -> tuple[int, ...]:
        cell = record["cell"]
        sizes = (cell["output_tokens"], cell["prompt_tokens"], cell["concurrency"])
        return workloads.index(cell["workload"]), *sizes, arms.index(record["arm"])

    return sorted(result["cells"], key=order)


def cell_name(cell: dict[str, Any]) -> str:
    """A cell in words."""
    return str(Cell(**cell))


def _activation(server: dict[str, Any]) -> str:
    if server["activation_ratio"] is not None:
        return format(server["activation_ratio"], ".0%")
    since_start = server["activation_ratio_since_start"]
    return NONE if since_start is None else f"{since_start:.0%} since start"


def latency_table(result: dict[str, Any]) -> Table:
    """Latencies of every finished cell, median / p90 / p99 in milliseconds."""
    heading = ["load", "arm", *(f"{name} ms" for name in LATENCIES.values()), "tokens/s"]
    heading += ["good requests/s" if result["settings"]["slo_ms"] else "requests/s", "wrong"]
    rate = "good_requests_per_s" if result["settings"]["slo_ms"] else "requests_per_s"
    rows = []
    for record in _sorted_cells(result):
        name = cell_name(record["cell"])
        if record["failure"]:
            last = record["failure"].strip().splitlines()[-1]
            blanks = [NONE] * (len(heading) - 3)
            rows.append([name, record["arm"], *blanks, f"client failed: {last}"])
            continue
        wrong = record["failed"] + record["cut_short"]
        asked = record["completed"] + record["failed"]
        row = [name, record["arm"], *(_percentiles(record, key) for key in LATENCIES)]
        row += [_figure(record["output_tokens_per_s"], ".1f"), _figure(record[rate], ".2f")]
        rows.append([*row, f"{wrong} of {asked}"])
    return heading, rows


def server_table(result: dict[str, Any]) -> Table:
    """What the servers themselves counted in every cell."""
    heading = ["load", "arm", "peak KV use", "prompt tokens from prefix cache", "preemptions"]
    heading += ["sparse decode rows", "dense rows, by reason"]
    rows = []
    for record in _sorted_cells(result):
        if record["failure"]:
            continue
        server = record["server"]
        dense = [
            f"{key.removeprefix('dense ')}: {value:.0f}"
            for key, value in server["decode_rows"].items()
            if not key.startswith("sparse ")
        ]
        row = [cell_name(record["cell"]), record["arm"], _figure(server["peak_kv_use"], ".1%")]
        row += [_figure(server["prefix_hit_share"], ".0%"), _figure(server["preemptions"])]
        rows.append([*row, _activation(server), ", ".join(dense) or NONE])
    return heading, rows


def crossover_table(result: dict[str, Any]) -> Table:
    """Median TPOT over the first arm's at each length, and where it falls below 1."""
    rows = []
    for ((workload, output_tokens, concurrency), arm), points in tpot_ratios(result).items():
        ratios = ", ".join(
            f"{point.prompt_tokens:,}: {point.ratio:.2f}" + ("" if point.is_active else " (dense)")
            for point in points
        )
        load = f"{workload}, {output_tokens} out x {concurrency}"
        rows.append([load, arm, ratios, verdict(points)])
    first = next(iter(result["arms"]))
    return ["load", "arm", f"TPOT / {first}, by prompt tokens", "verdict"], rows


def error_lines(result: dict[str, Any]) -> list[str]:
    """Everything that went wrong, nothing left out."""
    lines = []
    for record in _sorted_cells(result):
        title = f"{record['arm']}, {cell_name(record['cell'])}"
        if record["failure"]:
            lines.append(f"{title}: client failed: {record['failure'].strip().splitlines()[-1]}")
            continue
        lines += [f"{title}: {n} x {text}" for text, n in record["errors"].items()]
        if record["cut_short"]:
            lines.append(f"{title}: {record['cut_short']} answers ended early")
        if record["server"]["metrics_failure"]:
            lines.append(f"{title}: a reading is missing: {record['server']['metrics_failure']}")
    for entry in result["not_run"]:
        first_line = entry["reason"].splitlines()[0]
        lines.append(f"{entry['arm']}, {cell_name(entry['cell'])}: not run: {first_line}")
    return lines


def introduction(result: dict[str, Any]) -> list[str]:
    """What was measured, where, and how to read it."""
    machine, settings = result["machine"], result["settings"]
    slo = ", ".join(f"{name.upper()} <= {bound:g} ms" for name, bound in settings["slo_ms"].items())
    used = {record["cell"]["workload"] for record in result["cells"]}
    loads = "; ".join(f"{name}: {text}" for name, text in WORKLOADS.items() if name in used)
    clients = (
        "Load by vLLM's own benchmark client, closed loop, random tokens, greedy, run on the "
        "machine named here. Arms ran one after another, and a cell has only as many requests as "
        "its last column says: small differences are noise."
    )
    days = " and ".join(sorted({record["measured_on"] for record in result["cells"]}))
    return [
        f"Measured on {days}: {machine['cpu']}, vLLM {machine['vllm']}, "
        f"Python {machine['python']}, GPU of this machine: {machine['gpu']}.",
        clients,
        f"Loads: {loads}.",
        "Latencies are median / p90 / p99. Wrong: failed requests and answers that ended early.",
        f"A good request keeps {slo} (vLLM's goodput, which counts answers that ended early too)."
        if slo
        else "No SLO was set.",
        *result["notes"],
    ]


def _sections(result: dict[str, Any]) -> list[tuple[str, Table]]:
    sections = {
        "Where each arm decodes faster": crossover_table(result),
        "Latency and throughput": latency_table(result),
        "The servers' own figures": server_table(result),
    }
    return [(title, table) for title, table in sections.items() if table[1]]


def _arm_lines(result: dict[str, Any]) -> list[str]:
    return [
        f"{name}: " + (f"vllm-ext {' '.join(arm['serve'])}" if arm["serve"] else arm["url"])
        for name, arm in result["arms"].items()
    ]


def markdown(result: dict[str, Any]) -> str:
    """The run as Markdown, without the figures."""
    lines = ["# Load test", "", *_paragraphs(introduction(result))]
    lines += [f"- `{line}`" for line in _arm_lines(result)]
    for title, (heading, rows) in _sections(result):
        lines += ["", f"## {title}", "", _markdown_row(heading), "|---" * len(heading) + "|"]
        lines += [_markdown_row(row) for row in rows]
    lines += ["", "## Errors", ""]
    lines += [f"- {line}" for line in error_lines(result)] or ["None."]
    return "\n".join(lines) + "\n"


def _paragraphs(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in (line, "")]


def _markdown_row(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
td:last-child { white-space: normal; }
th { border-bottom: 2px solid #888; }
.wide { overflow-x: auto; } img { max-width: 100%; } code { font-size: 12px; } .bad { color: #a00; }
"""


def page(result: dict[str, Any]) -> str:
    """The run as one HTML page; figures are embedded, nothing is loaded from elsewhere."""
    parts = ["<!doctype html><html lang='en'><head><meta charset='utf-8'>"]
    parts += [f"<title>Load test</title><style>{_STYLE}</style></head><body><h1>Load test</h1>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in introduction(result)]
    parts += ["<ul>"]
    parts += [f"<li><code>{html.escape(line)}</code></li>" for line in _arm_lines(result)]
    parts += ["</ul>", *_images(result)]
    for title, table in _sections(result):
        parts += [f"<h2>{html.escape(title)}</h2>", _html_table(table)]
    errors = error_lines(result)
    parts.append("<h2>Errors</h2>")
    if errors:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in errors)
        parts.append(f"<ul class='bad'>{items}</ul>")
    else:
        parts.append("<p>None.</p>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _images(result: dict[str, Any]) -> list[str]:
    titles = {
        "Time per output token against the first arm (hollow: served dense)": plots.crossover_svg,
        "Throughput against latency (numbers: requests at once)": plots.throughput_svg,
    }
    if not tpot_ratios(result):  # one arm, or nothing to compare
        del titles[next(iter(titles))]
    parts = []
    for title, draw in titles.items():
        parts.append(f"<h2>{title}</h2>")
        try:
            data = base64.b64encode(draw(result).encode()).decode()
        except ImportError:
            parts.append("<p class='bad'>Not drawn: matplotlib is not installed.</p>")
        else:
            parts.append(f"<img alt='{title}' src='data:image/svg+xml;base64,{data}'>")
    return parts


def _html_table(table: Table) -> str:
    heading, rows = table

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = cells("th", heading)
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def write(result: dict[str, Any], output: Path) -> list[Path]:
    """Writes OUTPUT.md and OUTPUT.html; returns them."""
    paths = [output.with_suffix(".md"), output.with_suffix(".html")]
    for path, text in zip(paths, (markdown(result), page(result)), strict=True):
        path.write_text(text)
    return paths
