"""Draws the dashboard's panels without Grafana, from its own queries to a Prometheus.

    python -m deploy.observability.preview --prometheus http://127.0.0.1:9090 --minutes 5 \
        --output docs/observability.png

It is a check that every query gives data, and a picture for the documentation; it is not Grafana.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from deploy.observability.queries import DASHBOARD, Panel, panels
from vllm_ext.errors import UserError

Series = tuple[str, list[float], list[float]]  # legend, seconds since the start, values
_COLUMNS = 3
STEP_S = 2.0  # between two points of a series
_UNITS = {
    "ops": "1/s",
    "percentunit": "share",
    "s": "s",
    "Bps": "bytes/s",
    "none": "",
}


def legend(form: str, labels: dict[str, str]) -> str:
    """Grafana's legend of one series: ``{{label}}`` is its value."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), form)


def ask(
    prometheus: str, expr: str, start_s: float, end_s: float, step_s: float
) -> list[dict[str, Any]]:
    """The series of a range query.

    Args:
        prometheus: address of the server.
        expr: PromQL without Grafana's variables.
        start_s: of the range, Unix time.
        end_s: of the range, Unix time.
        step_s: between two points.

    Raises:
        UserError: no answer, or Prometheus refuses the query.
    """
    words = {"query": expr, "start": start_s, "end": end_s, "step": step_s}
    url = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(words)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            series: list[dict[str, Any]] = json.loads(answer.read())["data"]["result"]
            return series
    except urllib.error.HTTPError as error:
        raise UserError(f"Prometheus refuses {expr!r}: {error.read().decode()}") from None
    except OSError as error:
        raise UserError(f"--prometheus: {prometheus} does not answer: {error}") from None


def panel_series(
    panel: Panel, prometheus: str, start_s: float, end_s: float, window_s: int
) -> list[Series]:
    """All series of a panel, over a range.

    Args:
        panel: of the dashboard.
        prometheus: address of the server.
        start_s: of the range, Unix time.
        end_s: of the range, Unix time.
        window_s: what ``$__rate_interval`` stands for.
    """
    found: list[Series] = []
    for query in panel.queries:
        expr = query.expr.replace("$__rate_interval", f"{window_s}s")
        for series in ask(prometheus, expr, start_s, end_s, step_s=STEP_S):
            points = [(float(at), float(value)) for at, value in series["values"]]
            if any(value == value for _, value in points):
                name = legend(query.legend, series["metric"])
                found.append((name, *with_gaps([(at - start_s, value) for at, value in points])))
    return found


def with_gaps(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Seconds and values, with a NaN where points are missing: no line is drawn across."""
    seconds: list[float] = []
    values: list[float] = []
    for at, value in points:
        if seconds and at - seconds[-1] > 1.5 * STEP_S:
            seconds.append(seconds[-1] + STEP_S)
            values.append(math.nan)
        seconds.append(at)
        values.append(value)
    return seconds, values


def draw(data: list[tuple[Panel, list[Series]]], caption: str, path: Path) -> None:
    """One picture of all panels; those without data say so.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = -(-len(data) // _COLUMNS)
    figure, grid = pyplot.subplots(
        rows, _COLUMNS, figsize=(15, 2.7 * rows), dpi=90, squeeze=False, layout="constrained"
    )
    figure.suptitle(caption, fontsize=11)
    for axes in grid.flat[len(data) :]:
        axes.set_axis_off()
    shown = [seconds for _, series in data for _, seconds, _ in series]
    last_s = max((seconds[-1] for seconds in shown), default=1.0)
    first_s = min((seconds[0] for seconds in shown), default=0.0)
    for (panel, series), axes in zip(data, grid.flat, strict=False):
        axes.set_title(f"{panel.row}: {panel.title}", fontsize=9, loc="left")
        for name, seconds, values in series:
            axes.plot(seconds, values, label=name, linewidth=1.4)
        axes.set_ylabel(_UNITS.get(panel.unit, panel.unit), fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.set_xlim(first_s, last_s)
        if series:
            axes.set_ylim(0, 1.05 if panel.unit == "percentunit" else None)
            axes.legend(fontsize=7, loc="upper left")
        else:
            place = {"ha": "center", "va": "center", "transform": axes.transAxes}
            axes.text(0.5, 0.5, "no data", color="grey", **place)
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Command line.

    Returns:
        0; 2 for a user error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m deploy.observability.preview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD)
    parser.add_argument("--minutes", type=float, default=5, help="back from now (5)")
    parser.add_argument("--window-s", type=int, default=20, help="$__rate_interval (20)")
    parser.add_argument("--output", type=Path, default=Path("build/observability.png"))
    args = parser.parse_args(argv)
    end_s = time.time()
    start_s = end_s - 60 * args.minutes
    try:
        data = [
            (panel, panel_series(panel, args.prometheus, start_s, end_s, args.window_s))
            for panel in panels(args.dashboard)
        ]
    except UserError as error:
        print(f"preview: error: {error}", file=sys.stderr)
        return 2
    for panel, series in data:
        print(f"{panel.row}: {panel.title}: {len(series)} series" + ("" if series else " (!)"))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    caption = "vllm-ext dashboard: its queries, drawn by deploy/observability/preview.py"
    draw(data, f"{caption} (not Grafana); seconds", args.output)
    print(f"drawn: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
