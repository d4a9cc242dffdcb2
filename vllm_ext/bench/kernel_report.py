"""What ``vllm-ext bench kernel`` makes of its measurements: two checks and a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from vllm_ext.bench.cases import ANCHOR, DENSE_DECODE
from vllm_ext.bench.workloads import BatchSpec

ANCHOR_TARGET = 1.10  # the masses of an anchor cost at most a tenth of dense decode
FLAT_TARGET = 1.3  # a reuse layer reads its budget, whatever the context
QUIET_SPREAD = 2.0  # slowest / fastest round; more means that other work took the cores


def round_ratio(samples_ms: Sequence[float], rival_ms: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    pairs = zip(samples_ms, rival_ms, strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def derived_checks(
    specs: Sequence[BatchSpec], rows: Sequence[dict[str, Any]], budget_tokens: int
) -> list[dict[str, Any]]:
    """The kernels' two promises, as far as the rows of ``kernel.run`` can judge them.

    The reference promises nothing.

    Returns:
        ``name``, ``where``, ``ratio``, ``target`` and ``holds`` of each check that the
        batches allow.
    """
    timed = [row for row in rows if "ms" in row and row["impl"] != "reference"]
    return _anchor_checks(timed) + _flatness_checks(specs, timed, budget_tokens)


def _anchor_checks(timed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    dense = {(row["impl"], row["batch"]): row["ms"] for row in timed if row["op"] == DENSE_DECODE}
    return [
        _check(
            "anchor / dense decode",
            f"{row['impl']}, {row['batch']}",
            round_ratio(row["ms"], dense[row["impl"], row["batch"]]),
            ANCHOR_TARGET,
        )
        for row in timed
        if row["op"] == ANCHOR and (row["impl"], row["batch"]) in dense
    ]


def _flatness_checks(
    specs: Sequence[BatchSpec], timed: Sequence[dict[str, Any]], budget_tokens: int
) -> list[dict[str, Any]]:
    """Sparse decode over batches of equally many decode rows, on one context each.

    Contexts up to the budget are left out: there the context is what is read.
    """
    groups: dict[tuple[str, int], list[tuple[int, str, float]]] = {}
    for row in timed:
        spec = next(spec for spec in specs if spec.text == row["batch"])
        context_tokens = spec.rows[0].context_tokens
        is_uniform = spec.num_decode and len(set(spec.rows)) == 1
        if row["op"] == "sparse_decode" and is_uniform and context_tokens > budget_tokens:
            group = groups.setdefault((row["impl"], len(spec.rows)), [])
            group.append((context_tokens, spec.text, row["ms_median"]))
    checks = []
    for (impl, _), group in groups.items():
        (shortest, short_text, short_ms), (longest, long_text, long_ms) = min(group), max(group)
        if longest > shortest:
            where = f"{impl}, {long_text} / {short_text}"
            name = "sparse decode, longest / shortest context"
            checks.append(_check(name, where, long_ms / short_ms, FLAT_TARGET))
    return checks


def _check(name: str, where: str, ratio: float, target: float) -> dict[str, Any]:
    return {
        "name": name,
        "where": where,
        "ratio": ratio,
        "target": target,
        "holds": ratio <= target,
    }


def markdown(result: dict[str, Any]) -> str:
    """The result of ``kernel.run`` as a Markdown table, with what belongs below it."""
    shape, options, info = result["shape"], result["options"], result["machine"]
    on_gpu = options["device_type"] == "cuda"
    rows = result["rows"]
    baselines = list(dict.fromkeys(name for row in rows for name in row.get("ratios", {})))
    headings = ["batch", "op", "impl", "ms (median)", "spread", "MB read", "GB/s", "of memory"]
    headings += [f"/ {name}" for name in baselines]
    lines = [
        f"{shape['query_heads']} query heads, {shape['kv_heads']} KV heads of size "
        f"{shape['head_size']}, {shape['dtype']}, blocks of {shape['block_size']} tokens, budget "
        f"{options['budget_tokens']} tokens; {options['rounds']} alternating rounds, "
        f"{info['gpu'] if on_gpu else info['cpu']}, {info['torch_threads']} threads, load average "
        f"{info['load_average_at_start']} at the start, vLLM {info['vllm']}. Memory: "
        f"{result['bytes_per_second'] / 1e9:.1f} GB/s (torch sum or copy of 512 MB).",
        "",
        "| " + " | ".join(headings) + " |",
        "|" + "---|" * len(headings),
    ]
    lines += [_table_line(row, baselines) for row in rows]
    lines += ["", *(_check_line(check) for check in result["checks"])]
    noisy = [row for row in rows if "ms" in row and max(row["ms"]) > QUIET_SPREAD * min(row["ms"])]
    if noisy:
        lines.append(
            f"- {len(noisy)} of {len(rows)} rows spread over more than a factor of "
            f"{QUIET_SPREAD:.0f}: other work ran on this machine; repeat before you believe them"
        )
    lines += [
        f"- FAILED: {row['impl']} of {row['op']}, {row['batch']}: {row['failure']}"
        for row in rows
        if row["failure"]
    ]
    for impl, reasons in result["skipped"].items():
        for reason in dict.fromkeys(reasons.values()):
            ops = ", ".join(op for op, of_op in reasons.items() if of_op == reason)
            lines.append(f"- not run: {impl} of {ops}: {reason}")
    return "\n".join(lines).rstrip()


def _table_line(row: dict[str, Any], baselines: Sequence[str]) -> str:
    cells = [row["batch"], row["op"], row["impl"]]
    if row["failure"]:
        cells += ["**FAILED**"] + ["-"] * (4 + len(baselines))
    else:
        ratios = row["ratios"]
        cells += [
            f"{row['ms_median']:.3f}",
            f"{min(row['ms']):.3f} to {max(row['ms']):.3f}",
            f"{row['read_bytes'] / 1e6:.3f}",
            f"{row['gb_per_s']:.2f}",
            f"{row['bandwidth_share']:.0%}",
            *(f"{ratios[name]:.3f}" if name in ratios else "-" for name in baselines),
        ]
    return "| " + " | ".join(cells) + " |"


def _check_line(check: dict[str, Any]) -> str:
    verdict = "holds" if check["holds"] else "MISSED"
    return (
        f"- {check['name']} ({check['where']}): {check['ratio']:.3f}, "
        f"target at most {check['target']:.2f}: {verdict}"
    )
