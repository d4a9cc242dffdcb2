"""Fuzzes a running server, and says what broke, whose code it was, and what is still held.

    pip install schemathesis          # in an environment of its own; vLLM is not needed there
    vllm-ext serve MODEL --attention-backend TIDAL_DECODE --max-model-len 4096 --enforce-eager \
        --kv-cache-memory-bytes 300M --enable-scale-out >server.log 2>&1 &
    python -m deploy.fuzz --server-log server.log --output docs/benchmarks/fuzz-cpu

Requests go one after another, so that a 5xx and the lines it adds to the log belong together.
Every ``--canary-every`` requests a fixed question must get the answer it got at the start.
The exit code is 1 when the server died, hung, changed its answer, leaked KV blocks, or
answered 5xx (or cut an answer off) out of our code; what vLLM does so by itself is reported only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from deploy.fuzz_client import HELD, KV_USE, Fuzzer
from deploy.fuzz_requests import HostileRequest, mutated_requests, raw_requests, schema_requests


def draw_and_send(
    strategy: st.SearchStrategy[HostileRequest], count: int, run_seed: int, fuzzer: Fuzzer
) -> None:
    """Draws and sends up to ``count`` requests; fewer where the strategy has fewer."""

    @seed(run_seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def send(request: HostileRequest) -> None:
        fuzzer.send(request)

    send()


def fuzz(args: argparse.Namespace, fuzzer: Fuzzer) -> None:
    """Raw requests first, then those of the schema, then mutated ones up to the count."""
    fuzzer.ask_canary()
    for request in raw_requests(args.model, args.max_model_len):
        fuzzer.send(request)
    print(f"raw: {fuzzer.num_sent} requests sent", flush=True)
    if fuzzer.stopped:
        return
    strategies = schema_requests(args.url, fuzzer.auth())
    each = max(1, (args.requests - fuzzer.num_sent) // 2 // len(strategies))
    for number, (label, strategy) in enumerate(strategies):
        try:
            draw_and_send(strategy, each, args.seed + number, fuzzer)
        except Unsatisfiable:
            print(f"{label}: the schema allows no such request", flush=True)
    print(f"schema: {fuzzer.num_sent} requests sent", flush=True)
    left = args.requests - fuzzer.num_sent
    if left > 0:
        draw_and_send(mutated_requests(args.model), left, args.seed, fuzzer)
    fuzzer.ask_canary()


def grouped(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """5xx answers with one cause, by their smallest request, the most frequent first."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for error in errors:
        cause = (error["raised"] or error["answer"])[:60]
        groups.setdefault((error["path"], error["status"], cause), []).append(error)
    smallest = [min(group, key=lambda e: len(e["body"])) for group in groups.values()]
    counted = [
        {"count": len(group), **one} for one, group in zip(smallest, groups.values(), strict=True)
    ]
    return sorted(counted, key=lambda group: -int(group["count"]))


def result_of(args: argparse.Namespace, fuzzer: Fuzzer) -> dict[str, Any]:
    """Everything the run showed; ``failures`` decides the exit code."""
    figures = fuzzer.figures()
    failures = list(fuzzer.failures)
    if figures.get(KV_USE, 0.0) > 0:
        failures.append(f"{figures[KV_USE]:.2%} of the KV pool is still held")
    if figures.get(HELD, 0.0) > 0:
        failures.append(f"{figures[HELD]:.0f} KV blocks are still held")
    failures += [
        f"{error['status']} out of our code ({', '.join(error['ours'])}): {error['raised']}"
        for error in fuzzer.server_errors
        if error["ours"]
    ]
    return {
        "label": args.label,
        "settings": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items()
            if key not in ("api_key", "label")
        },
        "num_requests": fuzzer.num_sent,
        "kinds": dict(fuzzer.kinds),
        "statuses": {route: dict(counts) for route, counts in sorted(fuzzer.statuses.items())},
        "server_errors": grouped(fuzzer.server_errors),
        "alive": not fuzzer.lost,
        "figures_at_the_end": figures,
        "failures": failures,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The report for readers."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in result["kinds"].items())
    codes = sorted({code for counts in result["statuses"].values() for code in counts})
    lines = [
        f"{result['label']}: {result['num_requests']} requests ({kinds}). Server alive: "
        f"{'yes' if result['alive'] else 'NO'}. Failures: {len(result['failures'])}.",
        "",
        f"At the end: {result['figures_at_the_end']}.",
        "",
        f"| route | {' | '.join(codes)} |",
        "|---|" + "---|" * len(codes),
    ]
    for route, counts in result["statuses"].items():
        cells = " | ".join(str(counts.get(code, "")) for code in codes)
        lines.append(f"| `{route}` | {cells} |")
    lines += (
        ["", "5xx and answers cut off, by cause:", ""]
        if result["server_errors"]
        else ["", "No 5xx."]
    )
    for error in result["server_errors"]:
        whose = f"ours ({', '.join(error['ours'])})" if error["ours"] else "vLLM's"
        lines.append(
            f"- {error['count']} x {error['status']} `{error['method']} {error['path'][:80]}`, "
            f"{whose}: `{error['raised'] or error['answer'][:200]}`; smallest body: "
            f"`{error['body'][:160]}`"
        )
    lines += [f"- FAILURE: {failure[:1000]}" for failure in result["failures"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line; 0 when nothing failed."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="served name")
    parser.add_argument("--label", default="fuzz", help="what is fuzzed, for the report")
    parser.add_argument("--api-key", default="", help="sent as a bearer token")
    parser.add_argument("--server-log", type=Path, help="the server's output, to see whose 5xx")
    parser.add_argument("--max-model-len", type=int, default=4096, help="the server's")
    parser.add_argument("--requests", type=int, default=1200)
    parser.add_argument("--minutes", type=float, default=15, help="stop after this time")
    parser.add_argument("--timeout-s", type=float, default=60, help="of one request")
    parser.add_argument("--canary-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write PATH.json and PATH.md")
    args = parser.parse_args()
    fuzzer = Fuzzer(args)
    fuzz(args, fuzzer)
    result = result_of(args, fuzzer)
    report = as_markdown(result)
    print(report)
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(report)
    return int(bool(result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
