"""Fuzzes a running server, and says what broke, whose code it was, and what is still held.

    pip install schemathesis          # in an environment of its own; vLLM is not needed there
    python -m deploy.chaos.fuzz_adapter MODEL tiny-lora
    vllm-ext serve MODEL --attention-backend TIDAL_DECODE --budget-tokens 128 \
        --min-context-tokens 128 --max-model-len 4096 --max-num-batched-tokens 256 \
        --dtype float32 --enforce-eager --kv-cache-memory-bytes 200M --enable-scale-out \
        --enable-lora --lora-modules tiny=tiny-lora >server.log 2>&1 &
    python -m deploy.chaos.fuzz --server-log server.log --adapter tiny --requests 1500 \
        --output docs/benchmarks/fuzz-cpu

Small chunks (``--max-num-batched-tokens``) make prompts of 300 tokens take several, a small budget
and ``--min-context-tokens`` make them sparse; in float32 a batch does not move near ties.

Hostile requests go one after another, so that a 5xx and the lines it adds to the log belong
together. Valid ones with unusual options go in bursts of up to four, which share what they log;
some are asked alone as well and must get the same answer. Every ``--canary-every`` requests a
fixed question must get the answer it got at the start. The exit code is 1 when the server died,
hung, changed an answer, leaked KV blocks, or answered 5xx (or cut an answer off) out of our code;
what vLLM does so by itself is reported only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from deploy.chaos.fuzz_client import HELD, KV_USE, Fuzzer
from deploy.chaos.fuzz_options import OptionSpace, bursts
from deploy.chaos.fuzz_requests import mutated_requests, raw_requests, schema_requests

T = TypeVar("T")


def draw_and_send(
    strategy: st.SearchStrategy[T], count: int, run_seed: int, send: Callable[[T], None]
) -> None:
    """Draws and sends up to ``count`` times; less often where the strategy has fewer."""

    @seed(run_seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def drawn(value: T) -> None:
        send(value)

    drawn()


def fuzz(args: argparse.Namespace, fuzzer: Fuzzer) -> None:
    """Raw requests first; of what is left a quarter from the schema, half with unusual options,
    and mutated ones up to the count.
    """
    fuzzer.ask_canary()
    for request in raw_requests(args.model, args.max_model_len):
        fuzzer.send(request)
    print(f"raw: {fuzzer.num_sent} requests sent", flush=True)
    if fuzzer.stopped:
        return
    left = args.requests - fuzzer.num_sent
    send_schema(args, fuzzer, left // 4)
    print(f"schema: {fuzzer.num_sent} requests sent", flush=True)
    space = OptionSpace((args.model, *args.adapter), args.chunk_tokens)
    until = fuzzer.num_sent + left // 2
    for round_seed in range(args.seed, args.seed + 1000):
        if fuzzer.stopped or fuzzer.num_sent >= until:
            break  # a burst's size is not known before it is drawn
        draw_and_send(bursts(space), 20, round_seed, fuzzer.send_burst)
    print(f"options: {fuzzer.num_sent} requests sent", flush=True)
    left = args.requests - fuzzer.num_sent
    if left > 0:
        draw_and_send(mutated_requests(args.model), left, args.seed, fuzzer.send)
    fuzzer.ask_canary()


def send_schema(args: argparse.Namespace, fuzzer: Fuzzer, count: int) -> None:
    """About ``count`` requests, as many of each operation of the server's schema."""
    strategies = schema_requests(args.url, fuzzer.auth())
    each = max(1, count // len(strategies))
    for number, (label, strategy) in enumerate(strategies):
        try:
            draw_and_send(strategy, each, args.seed + number, fuzzer.send)
        except Unsatisfiable:
            print(f"{label}: the schema allows no such request", flush=True)


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
        "num_bursts": fuzzer.num_bursts,
        "num_compared": fuzzer.num_compared,
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
        f"Requests with options went in {result['num_bursts']} bursts; {result['num_compared']} "
        "were answered alone, too, and compared.",
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
            + (
                f" (log lines of {error['sent_together']} at once)"
                if error["sent_together"] > 1
                else ""
            )
        )
    lines += [f"- FAILURE: {failure[:1000]}" for failure in result["failures"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line; 0 when nothing failed."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.chaos.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="served name")
    parser.add_argument(
        "--adapter", action="append", default=[], help="served name of a LoRA adapter (repeatable)"
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=256, help="the server's --max-num-batched-tokens"
    )
    parser.add_argument("--label", default="fuzz", help="what is fuzzed, for the report")
    parser.add_argument("--api-key", default="", help="sent as a bearer token")
    parser.add_argument("--server-log", type=Path, help="the server's output, to see whose 5xx")
    parser.add_argument("--max-model-len", type=int, default=4096, help="the server's")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--minutes", type=float, default=25, help="stop after this time")
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
