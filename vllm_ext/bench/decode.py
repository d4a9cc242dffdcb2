"""Decode time per output token, stock vLLM against ours, in alternating runs.

Every arm is an engine in its own process; all stay loaded, one works at a time. Contexts
are distinct and primed first, so that only decode steps are timed: the time per step is
``(t(long) - t(short)) / (long - short)`` over two generation lengths.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attn_backends.methods import REGISTRY
from vllm_ext.bench.arm import MARK
from vllm_ext.errors import UserError
from vllm_ext.plugin import DISABLE_ENV, vllm_version

STOCK = "stock"  # extension switched off
INSTALLED = "installed"  # extension active, no method chosen


@dataclass(frozen=True)
class Workload:
    """What is timed."""

    model: str
    batch: int
    context_tokens: int
    short_tokens: int = 8
    long_tokens: int = 40
    rounds: int = 7
    seed: int = 0


class Arm:
    """A running engine of one kind.

    Raises:
        UserError: the engine did not start; the message has the end of its log.
    """

    def __init__(self, name: str, workload: Workload, settings: dict[str, Any]) -> None:
        self.name = name
        options = {
            "model": workload.model,
            "attention_backend": name if name in REGISTRY else None,
            "additional_config": {"vllm_ext": settings} if name in REGISTRY and settings else {},
            "max_model_len": workload.context_tokens + workload.long_tokens + 64,
            "batch": workload.batch,
            "kv_bytes": _kv_bytes(workload),
        }
        env = os.environ | {"VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
        env.pop(DISABLE_ENV, None)
        if name == STOCK:
            env[DISABLE_ENV] = "1"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_ext.bench.arm", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return answer
        self._log.seek(0)
        tail = "".join(self._log.readlines()[-25:])
        raise UserError(f"the {self.name} engine ended; the end of its log:\n{tail}")

    def generate(self, prompts: list[list[int]], max_tokens: int) -> float:
        """Seconds to generate ``max_tokens`` for every prompt."""
        assert self._process.stdin is not None
        print(
            json.dumps({"prompts": prompts, "max_tokens": max_tokens}),
            file=self._process.stdin,
            flush=True,
        )
        answer = self._answer()
        assert answer["tokens"] == max_tokens * len(prompts)
        return float(answer["seconds"])

    def close(self) -> None:
        """Stops the engine."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


def _kv_bytes(workload: Workload) -> int:
    config = json.loads(Path(workload.model, "config.json").read_text())
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token_bytes = config["num_hidden_layers"] * 2 * heads * head_size * 2
    # Two blocks of 128 tokens of slack per request, and one for the null block.
    tokens = (workload.context_tokens + workload.long_tokens + 256) * workload.batch + 256
    return int(tokens * token_bytes)


def _prompts(workload: Workload) -> list[list[int]]:
    source = random.Random(workload.seed)
    return [
        [source.randrange(100, 40_000) for _ in range(workload.context_tokens)]
        for _ in range(workload.batch)
    ]


def tpot_ms(arm: Arm, prompts: list[list[int]], workload: Workload) -> float:
    """Milliseconds per decode step, prefill and start-up cost cancelled out."""
    short = arm.generate(prompts, workload.short_tokens)
    long = arm.generate(prompts, workload.long_tokens)
    return 1000 * (long - short) / (workload.long_tokens - workload.short_tokens)


def run(
    workload: Workload, arm_names: list[str], settings: dict[str, Any], echo: Callable[[str], None]
) -> dict[str, Any]:
    """Times all arms.

    Args:
        workload: what to time.
        arm_names: ``stock``, ``installed`` or a method's name; the first is the baseline.
        settings: vllm_ext settings for the method arms.
        echo: progress lines go here.

    Returns:
        Per arm the TPOTs of all rounds, their median and spread, and the ratio to the
        baseline of the same round; plus workload and machine.
    """
    prompts = _prompts(workload)
    arms = []
    samples: dict[str, list[float]] = {name: [] for name in arm_names}
    try:
        for name in arm_names:
            echo(f"{name}: starting and priming {workload.batch} x {workload.context_tokens} ...")
            arms.append(Arm(name, workload, settings))
            arms[-1].generate(prompts, 1)
        for round_number in range(workload.rounds):
            # A rotating order: no arm always runs first after another.
            shift = round_number % len(arms)
            for arm in arms[shift:] + arms[:shift]:
                samples[arm.name].append(tpot_ms(arm, prompts, workload))
            line = ", ".join(f"{name} {values[-1]:.1f}" for name, values in samples.items())
            echo(f"round {round_number + 1} of {workload.rounds}: TPOT ms {line}")
    finally:
        for arm in arms:
            arm.close()
    return {
        "workload": asdict(workload),
        "settings": settings,
        "machine": machine(),
        "arms": {name: _summary(samples[name], samples[arm_names[0]]) for name in arm_names},
    }


def _summary(values: list[float], baseline: list[float]) -> dict[str, Any]:
    ratios = [value / base for value, base in zip(values, baseline, strict=True)]
    return {
        "tpot_ms": values,
        "tpot_ms_median": statistics.median(values),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def machine() -> dict[str, str]:
    """Where the figures come from."""
    cpu = "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    return {
        "cpu": f"{os.cpu_count()} x {cpu}",
        "python": platform.python_version(),
        "vllm": vllm_version(),
        "gpu": "none (not run on a GPU)",
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    work, info = result["workload"], result["machine"]
    lines = [
        f"Decode, {work['batch']} x {work['context_tokens']} distinct tokens, "
        f"{Path(work['model']).name}, {work['rounds']} alternating rounds, {info['cpu']}, "
        f"vLLM {info['vllm']}.",
        "",
        "| arm | TPOT ms (median) | TPOT / first arm (median) | spread |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {arm['tpot_ms_median']:.1f} | {arm['ratio_median']:.3f} "
        f"| {arm['ratio_min']:.3f} to {arm['ratio_max']:.3f} |"
        for name, arm in result["arms"].items()
    ]
    return "\n".join(lines)
