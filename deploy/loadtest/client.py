"""The load generator of one arm: a ``bench_serve`` process, and what it answered, summarised."""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.loadtest.grid import CHUNK_TOKENS
from vllm_ext.child import Child
from vllm_ext.errors import UserError

LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
PERCENTILES = (50, 90, 95, 99)
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class ClientFailed(RuntimeError):
    """The load generator itself failed; the message has the end of its log."""


class OutOfTime(RuntimeError):
    """The run's time was over before the cell was."""


@dataclass(frozen=True)
class Target:
    """Where the load goes.

    Attributes:
        url: without ``/v1``.
        model: the name that requests carry.
        tokenizer: folder or name of the tokenizer, for random prompts.
        slo: bounds in milliseconds by vLLM's names (``ttft``, ``tpot``); may be empty.
    """

    url: str
    model: str
    tokenizer: str
    slo: dict[str, float]


def bench_words(target: Target, trace: Path, num_requests: int, max_in_flight: int) -> list[str]:
    """The command line of ``vllm bench serve`` for one trace, its times and bound kept."""
    words = ["--backend", "openai", "--base-url", target.url, "--model", target.model]
    words += ["--served-model-name", target.model, "--tokenizer", target.tokenizer]
    words += ["--dataset-name", "timed_trace", "--dataset-path", str(trace), "--self-timed"]
    words += ["--timed-trace-chunk-hash-size", str(CHUNK_TOKENS)]
    words += ["--num-prompts", str(num_requests), "--max-concurrency", str(max_in_flight)]
    words += ["--temperature", "0", "--disable-tqdm", "--save-detailed"]
    words += ["--percentile-metrics", ",".join(LATENCIES)]
    words += ["--metric-percentiles", ",".join(map(str, PERCENTILES))]
    if target.slo:
        words += ["--goodput", *(f"{name}:{bound}" for name, bound in target.slo.items())]
    return words


def client_environment(allow_remote: bool) -> dict[str, str]:
    """The load generator's environment.

    The key in ``VLLM_API_KEY`` goes where vLLM's benchmark reads it, and no other key is sent.
    Prompts are the same in every process, hence the hash seed; and a proxy must not carry
    away what is meant for this machine.
    """
    env = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
    if os.environ.get("VLLM_API_KEY"):
        env["OPENAI_API_KEY"] = os.environ["VLLM_API_KEY"]
    if not allow_remote:
        env = {key: value for key, value in env.items() if key.lower() not in _PROXIES}
    env.setdefault("HF_HUB_OFFLINE", "1")
    return env | {"PYTHONHASHSEED": "0", "VLLM_LOGGING_LEVEL": "WARNING"}


class BenchClient:
    """One running ``bench_serve``, started when first needed."""

    def __init__(self, env: dict[str, str]) -> None:
        self._env = env
        self._child: Child | None = None

    def run(self, target: Target, lines: list[str], max_in_flight: int, limit_s: float) -> Any:
        """Sends the requests of a trace and waits for all answers.

        Args:
            target: where to.
            lines: of ``grid.trace``.
            max_in_flight: requests at once.
            limit_s: after so many seconds the client is ended.

        Returns:
            vLLM's result.

        Raises:
            OutOfTime: the limit was reached.
            ClientFailed: the benchmark raised or its process ended.
        """
        if limit_s <= 0:
            raise OutOfTime("no time was left (--max-minutes)")
        if self._child is None:
            self._child = Child("load generator", "deploy.loadtest.bench_serve", self._env)
        with tempfile.TemporaryDirectory(prefix="vllm-ext-loadtest-") as folder:
            trace = Path(folder, "trace.jsonl")
            trace.write_text("\n".join(lines) + "\n")
            words = bench_words(target, trace, len(lines), max_in_flight)
            try:
                answer = self._child.ask(words, limit_s)
            except TimeoutError:
                self.close()
                raise OutOfTime(f"not answered within {limit_s:.0f} s") from None
            except UserError as error:
                self.close()
                raise ClientFailed(str(error)) from None
        if "failure" in answer:
            raise ClientFailed(answer["failure"])
        return answer["result"]

    def close(self) -> None:
        """Ends the process; the next run starts another one."""
        if self._child is not None:
            self._child.kill()
            self._child = None


def _number(value: Any) -> float | None:
    """JSON has no NaN: figures that vLLM could not compute are null."""
    return float(value) if value is not None and math.isfinite(value) else None


def summarise(result: dict[str, Any], wanted_tokens: list[int]) -> dict[str, Any]:
    """What the report needs of vLLM's result.

    Args:
        result: of ``vllm bench serve`` with its detailed lists.
        wanted_tokens: output tokens that each request asked for, in the order sent.

    Returns:
        Latencies in milliseconds, throughput per second, and every kind of error with its
        count. vLLM counts a stream that ended early as completed; here it is ``cut_short``.
    """
    has_completed = result["completed"] > 0
    latencies: dict[str, dict[str, float | None]] = {}
    for name in LATENCIES:
        keys = ["mean", *(f"p{percentile}" for percentile in PERCENTILES)]
        has_steps = name in ("ttft", "e2el") or max(wanted_tokens) > 1
        latencies[name] = {
            key: _number(result[f"{key}_{name}_ms"]) if has_completed and has_steps else None
            for key in keys
        }
    failed = [error for error in result["errors"] if error]
    num_short = sum(
        0 < got < wanted for got, wanted in zip(result["output_lens"], wanted_tokens, strict=True)
    )
    return {
        "duration_s": result["duration"],
        "completed": result["completed"],
        "failed": result["failed"],
        "cut_short": num_short,
        "errors": dict(Counter(error.strip().splitlines()[-1][:200] for error in failed)),
        "latency_ms": latencies,
        "output_tokens_per_s": _number(result["output_throughput"]),
        "requests_per_s": _number(result["request_throughput"]),
        "good_requests_per_s": _number(result["request_goodput"]),
        "input_tokens": result["total_input_tokens"],
        "output_tokens_total": result["total_output_tokens"],
    }
