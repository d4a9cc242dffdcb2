"""From which prompt length on an arm decodes faster than the first one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Group = tuple[str, int, int]  # workload, output tokens, concurrency


@dataclass(frozen=True)
class Point:
    """An arm at one prompt length.

    Attributes:
        prompt_tokens: of every request.
        ratio: its median TPOT over the first arm's.
        is_active: False where the server counted no sparse decode row: the ratio is then noise
            or overhead, not the method's.
    """

    prompt_tokens: int
    ratio: float
    is_active: bool = True


def tpot_ratios(result: dict[str, Any]) -> dict[tuple[Group, str], list[Point]]:
    """Every arm against the first, by load and arm, ascending in prompt length.

    Cells that failed, or that the first arm does not have, are left out.
    """
    arms = list(result["arms"])
    cells: dict[tuple[Group, int, str], dict[str, Any]] = {}
    for record in result["cells"]:
        if record["failure"] or record["latency_ms"]["tpot"]["p50"] is None:
            continue
        cell = record["cell"]
        group = (cell["workload"], cell["output_tokens"], cell["concurrency"])
        cells[group, cell["prompt_tokens"], record["arm"]] = record
    ratios: dict[tuple[Group, str], list[Point]] = {}
    for (group, prompt, arm), record in sorted(cells.items(), key=lambda item: item[0]):
        first = cells.get((group, prompt, arms[0]))
        if arm == arms[0] or first is None:
            continue
        ratio = record["latency_ms"]["tpot"]["p50"] / first["latency_ms"]["tpot"]["p50"]
        is_active = record["server"]["activation_ratio"] != 0
        ratios.setdefault((group, arm), []).append(Point(prompt, ratio, is_active))
    return ratios


def crossover_tokens(points: list[tuple[int, float]]) -> float | None:
    """The prompt length from which on the ratio stays below 1.

    Args:
        points: (prompt tokens, ratio), ascending.

    Returns:
        Interpolated on a logarithmic axis; the first length if the ratio is always below 1;
        None if it is not below 1 at the last length.
    """
    if not points or points[-1][1] >= 1:
        return None
    above = [number for number, (_, ratio) in enumerate(points) if ratio >= 1]
    if not above:
        return float(points[0][0])
    (left, left_ratio), (right, right_ratio) = points[above[-1]], points[above[-1] + 1]
    share = (left_ratio - 1) / (left_ratio - right_ratio)
    return 2 ** (math.log2(left) + share * (math.log2(right) - math.log2(left)))


def verdict(points: list[Point]) -> str:
    """``crossover_tokens`` in words, of the points where the method was active."""
    active = [(point.prompt_tokens, point.ratio) for point in points if point.is_active]
    if not active:
        return "never active: every row was served dense"
    crossing = crossover_tokens(active)
    if crossing is None:
        return f"not faster at {active[-1][0]:,} tokens"
    if crossing == active[0][0]:
        return f"faster from {active[0][0]:,} tokens, the shortest where it was active"
    return f"faster from about {crossing:,.0f} tokens"
