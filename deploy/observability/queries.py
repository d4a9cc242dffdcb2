"""The dashboard's queries, and the metric names that they use."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

DASHBOARD = Path(__file__).with_name("grafana-dashboard.json")
_NOT_NAMES = {"and", "or", "unless", "on", "ignoring", "group_left", "group_right", "bool"}


@dataclass(frozen=True)
class Query:
    """One target of a panel: PromQL with Grafana's variables, and its legend."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A time series panel.

    Attributes:
        title: of the panel.
        row: the title of the dashboard row it is in.
        unit: Grafana's name of the unit.
        queries: its targets.
    """

    title: str
    row: str
    unit: str
    queries: tuple[Query, ...]


def panels(path: Path = DASHBOARD) -> list[Panel]:
    """All time series panels of a Grafana dashboard file, in its order."""
    found, row = [], ""
    for panel in json.loads(path.read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        queries = tuple(Query(t["expr"], t["legendFormat"]) for t in panel["targets"])
        unit = panel["fieldConfig"]["defaults"]["unit"]
        found.append(Panel(panel["title"], row, unit, queries))
    return found


def metric_names(expr: str) -> set[str]:
    """Every metric that a PromQL expression reads."""
    bare = re.sub(r'"[^"]*"', "", expr)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    words = re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)
    return {word for word in words if word not in _NOT_NAMES}
