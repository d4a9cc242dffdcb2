"""What ``vllm-ext bench kernel`` makes of its measurements: checks, sums and a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from vllm_ext.bench.cases import ANCHOR, DECODE_ATTENTION, DENSE_DECODE, SCORES
from vllm_ext.bench.machine import versions
from vllm_ext.bench.timing import BANDWIDTH_BYTES
from vllm_ext.bench.workloads import BatchSpec

ANCHOR_TARGET = 1.10  # the masses of an anchor cost at most a tenth of dense decode
FLAT_TARGET = 1.3  # a reuse layer reads its budget, whatever the context
QUIET_SPREAD = 2.0  # slowest / fastest round; more means that other work took the cores
EXTRA_COLUMNS = {"host_us": "host us per call", "tflops": "TFLOP/s"}  # where they say something
LAYERS, DENSE_LAYERS, ANCHOR_LAYERS = 32, 1, 8  # of the model whose attention is summed up


def round_ratio(samples_ms: Sequence[float], rival_ms: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    pairs = zip(samples_ms, rival_ms, strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def derived_checks(
    specs: Sequence[BatchSpec], rows: Sequence[dict[str, Any]], budget_tokens: int | None
) -> list[dict[str, Any]]:
    """The kernels' two promises, as far as the rows of ``kernel.run`` can judge them.

    The reference promises nothing.

    Args:
        specs: the batches.
        rows: of ``kernel.run``.
        budget_tokens: of every batch; None: it grew with the context, and so did what is read.

    Returns:
        ``name``, ``where``, ``ratio``, ``target`` and ``holds`` of each check that the
        batches allow.
    """
    checks = []
    for block_size in _block_sizes(rows):
        timed = [row for row in rows if "ms" in row and row["impl"] != "reference"]
        timed = [row for row in timed if row["block_size"] == block_size]
        found = _anchor_checks(timed)
        if budget_tokens is not None:
            found += _flatness_checks(specs, timed, budget_tokens)
        for check in found:
            check["where"] += _blocks(block_size, rows)
        checks += found
    return checks


def _block_sizes(rows: Sequence[dict[str, Any]]) -> list[int]:
    return list(dict.fromkeys(row["block_size"] for row in rows))


def _blocks(block_size: int, rows: Sequence[dict[str, Any]]) -> str:
    """Says the block size where there are several."""
    return f", blocks of {block_size}" if len(_block_sizes(rows)) > 1 else ""


def composed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Attention of a whole model, summed up from its ops, against dense attention in all layers.

    Of 32 layers one is dense (by whatever is fastest there), eight are anchors (masses, top-k and
    sparse decode) and the others sparse decode.

    Returns:
        ``where``, ``ms``, ``dense`` (the fastest dense baseline), ``dense_ms`` and ``ratio`` of
        every implementation, batch and block size that has all these ops.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if "ms" in row:
            groups.setdefault((row["batch"], row["block_size"]), []).append(row)
    sums = []
    for (batch, block_size), group in groups.items():
        names = {row["op"] for row in group if row["is_baseline"]}
        dense_name = DECODE_ATTENTION if DECODE_ATTENTION in names else "paged_attention"
        baselines = {
            row["impl"]: row["ms_median"]
            for row in group
            if row["is_baseline"] and row["op"] == dense_name
        }
        own_dense = [row["ms_median"] for row in group if row["op"] == DENSE_DECODE]
        for impl in dict.fromkeys(row["impl"] for row in group if not row["is_baseline"]):
            ms = {row["op"]: row["ms_median"] for row in group if row["impl"] == impl}
            if not (baselines and own_dense) or {SCORES, "block_topk", "sparse_decode"} - {*ms}:
                continue
            anchor_ms = ms[SCORES] + ms["block_topk"]  # and what every sparse layer does
            total_ms = DENSE_LAYERS * min(own_dense) + ANCHOR_LAYERS * anchor_ms
            total_ms += (LAYERS - DENSE_LAYERS) * ms["sparse_decode"]
            dense = min(baselines, key=lambda name: baselines[name])
            dense_ms = LAYERS * baselines[dense]
            found = {"where": f"{impl}, {batch}{_blocks(block_size, rows)}", "ms": total_ms}
            found |= {"dense": dense, "dense_ms": dense_ms, "ratio": dense_ms / total_ms}
            sums.append(found)
    return sums


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
    rows = result["rows"]
    baselines = list(dict.fromkeys(name for row in rows for name in row.get("ratios", {})))
    extra = [field for field in EXTRA_COLUMNS if any(field in row for row in rows)]
    headings = ["batch", "op", "impl", "ms (median)", "spread", "MB read", "GB/s", "of memory"]
    headings += [EXTRA_COLUMNS[field] for field in extra] + [f"/ {name}" for name in baselines]
    lines = [
        _about(result),
        "",
        "| " + " | ".join(headings) + " |",
        "|" + "---|" * len(headings),
    ]
    for row in rows:
        where = row["batch"] + _blocks(row["block_size"], rows)
        lines.append("| " + " | ".join([where, *_cells(row, extra, baselines)]) + " |")
    lines += ["", *(_check_line(check) for check in result["checks"])]
    lines += [
        f"- attention of {LAYERS} layers, {DENSE_LAYERS} dense and {ANCHOR_LAYERS} anchors "
        f"({found['where']}): {found['ms']:.2f} ms, {found['dense']} {found['dense_ms']:.2f} ms: "
        f"{found['ratio']:.2f} times as fast (sum of medians)"
        for found in result["composed"]
    ]
    lines += _remarks(result)
    return "\n".join(lines).rstrip()


def _about(result: dict[str, Any]) -> str:
    shape, options, info = result["shape"], result["options"], result["machine"]
    device_type, share = options["device_type"], options["budget_share"]
    budget = (
        f"{options['budget_tokens']} tokens" if share is None else f"{share:.0%} of the context"
    )
    block_sizes = " and ".join(map(str, result["block_sizes"]))
    return (
        f"{shape['query_heads']} query heads, {shape['kv_heads']} KV heads of size "
        f"{shape['head_size']}, {shape['dtype']}, blocks of {block_sizes} tokens, budget "
        f"{budget}; {options['rounds']} alternating rounds, "
        f"{info['gpu' if device_type == 'cuda' else 'cpu']}, {info['torch_threads']} threads, "
        f"load average {info['load_average_at_start']} at the start, {versions(info)}. Memory: "
        f"{result['bytes_per_second'] / 1e9:.1f} GB/s (torch sum or copy of "
        f"{BANDWIDTH_BYTES[device_type] >> 20} MB)."
    )


def _remarks(result: dict[str, Any]) -> list[str]:
    """What was noisy, what failed, what was not run."""
    rows, lines = result["rows"], []
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
    return lines


def _cells(row: dict[str, Any], extra: Sequence[str], baselines: Sequence[str]) -> list[str]:
    cells = [row["op"], row["impl"]]
    if row["failure"]:
        return [*cells, "**FAILED**", *["-"] * (4 + len(extra) + len(baselines))]
    ratios, digits = row["ratios"], 4 if "host_us" in row else 3
    return [
        *cells,
        f"{row['ms_median']:.{digits}f}",
        f"{min(row['ms']):.{digits}f} to {max(row['ms']):.{digits}f}",
        f"{row['read_bytes'] / 1e6:.3f}",
        f"{row['gb_per_s']:.2f}",
        f"{row['bandwidth_share']:.0%}",
        *(f"{row[field]:.0f}" if field in row else "-" for field in extra),
        *(f"{ratios[name]:.3f}" if name in ratios else "-" for name in baselines),
    ]


def _check_line(check: dict[str, Any]) -> str:
    verdict = "holds" if check["holds"] else "MISSED"
    return (
        f"- {check['name']} ({check['where']}): {check['ratio']:.3f}, "
        f"target at most {check['target']:.2f}: {verdict}"
    )
