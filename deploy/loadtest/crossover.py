"""From which prompt length on an arm decodes faster than the first one."""

from __future__ import annotations

import math
from typing import Any

Group = tuple[str, int, int]  # workload, output tokens, concurrency


def tpot_ratios(result: dict[str, Any]) -> dict[tuple[Group, str], list[tuple[int, float]]]:
    """Median TPOT over the first arm's, by load and arm, as (prompt tokens, ratio) ascending.

    Cells that failed, or that the first arm does not have, are left out.
    """
    arms = list(result["arms"])
    tpot: dict[tuple[Group, int, str], float] = {}
    for record in result["cells"]:
        if record["failure"] or record["latency_ms"]["tpot"]["p50"] is None:
            continue
        cell = record["cell"]
        group = (cell["workload"], cell["output_tokens"], cell["concurrency"])
        tpot[group, cell["prompt_tokens"], record["arm"]] = record["latency_ms"]["tpot"]["p50"]
    ratios: dict[tuple[Group, str], list[tuple[int, float]]] = {}
    for (group, prompt, arm), value in sorted(tpot.items()):
        first = tpot.get((group, prompt, arms[0]))
        if arm != arms[0] and first:
            ratios.setdefault((group, arm), []).append((prompt, value / first))
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


def verdict(points: list[tuple[int, float]]) -> str:
    """``crossover_tokens`` in words."""
    crossing = crossover_tokens(points)
    if crossing is None:
        return f"not faster at {points[-1][0]:,} tokens"
    if crossing == points[0][0]:
        return f"faster from {points[0][0]:,} tokens, the shortest measured"
    return f"faster from about {crossing:,.0f} tokens"
