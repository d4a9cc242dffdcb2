"""Decode time per output token, stock vLLM against ours, in alternating runs.

Every arm is an engine in its own process; all stay loaded and prime their contexts at once,
then one works at a time. Contexts are distinct and in the prefix cache, so that only decode
steps are timed: the time per step is
``(t(long) - t(short)) / (long - short)`` over two generation lengths.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attn_backends.config import known_settings
from attn_backends.methods import REGISTRY, load_method
from vllm_ext.engine_process import EngineProcess, kv_token_bytes
from vllm_ext.plugin import DISABLE_ENV, vllm_version

STOCK = "stock"  # extension switched off
INSTALLED = "installed"  # extension active, no method chosen


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    Attributes:
        name: as the user wrote it.
        engine: ``stock``, ``installed`` or a method's name.
        settings: of this arm alone.
    """

    name: str
    engine: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One load: requests at once, tokens of context each."""

    batch: int
    context_tokens: int


@dataclass(frozen=True)
class Workload:
    """What is timed: all arms in every cell."""

    model: str
    cells: tuple[Cell, ...]
    dtype: str
    is_eager: bool = False
    short_tokens: int = 8
    long_tokens: int = 40
    rounds: int = 7
    seed: int = 0


def start_arm(arm: Arm, workload: Workload, settings: dict[str, Any]) -> EngineProcess:
    """The engine of one side of the comparison, large enough for every cell.

    Args:
        arm: which one.
        workload: what it must hold.
        settings: of all arms; those that the method does not know are not given to it.

    Raises:
        UserError: it did not start; the message has the end of its log.
    """
    engine = {
        "model": workload.model,
        "max_model_len": max(c.context_tokens for c in workload.cells) + workload.long_tokens + 64,
        "max_num_seqs": max(cell.batch for cell in workload.cells),
        "kv_cache_memory_bytes": _kv_bytes(workload),
        "dtype": workload.dtype,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "enforce_eager": workload.is_eager,
        "seed": 0,
    }
    if arm.engine in REGISTRY:
        own = known_settings(load_method(arm.engine).config_cls, settings) | arm.settings
        engine |= {"attention_backend": arm.engine}
        engine |= {"additional_config": {"vllm_ext": own}} if own else {}
    return EngineProcess(arm.name, engine, {DISABLE_ENV: "1" if arm.engine == STOCK else None})


def _kv_bytes(workload: Workload) -> int:
    # Two blocks of 128 tokens of slack per request, and one for the null block.
    tokens = max(
        (cell.context_tokens + workload.long_tokens + 256) * cell.batch + 256
        for cell in workload.cells
    )
    return tokens * kv_token_bytes(workload.model, workload.dtype)


def _prompts(workload: Workload, cell: Cell) -> list[list[int]]:
    source = random.Random(f"{workload.seed} {cell}")
    return [
        [source.randrange(100, 40_000) for _ in range(cell.context_tokens)]
        for _ in range(cell.batch)
    ]


def tpot_ms(arm: EngineProcess, prompts: list[list[int]], workload: Workload) -> float:
    """Milliseconds per decode step, prefill and start-up cost cancelled out."""
    short = arm.generate(prompts, workload.short_tokens)["seconds"]
    long = arm.generate(prompts, workload.long_tokens)["seconds"]
    return 1000 * float(long - short) / (workload.long_tokens - workload.short_tokens)


def run(
    workload: Workload, compared: list[Arm], settings: dict[str, Any], echo: Callable[[str], None]
) -> dict[str, Any]:
    """Times all arms in all cells.

    Args:
        workload: what to time.
        compared: the arms; the first is the baseline.
        settings: vllm_ext settings for the method arms.
        echo: progress lines go here.

    Returns:
        Per cell and arm the TPOTs of all rounds, their median and spread, and the ratio to the
        baseline of the same round; plus workload and machine.
    """
    arms: list[EngineProcess] = []
    cells = []
    try:
        for arm in compared:
            echo(f"{arm.name}: starting ...")
            arms.append(start_arm(arm, workload, settings))
        for cell in workload.cells:
            samples = _time_cell(workload, cell, arms, echo)
            baseline = samples[compared[0].name]
            figures = {name: _summary(values, baseline) for name, values in samples.items()}
            cells.append(asdict(cell) | {"arms": figures})
    finally:
        for engine in arms:
            engine.close()
    return {
        "workload": asdict(workload),
        "settings": settings,
        "machine": machine(),
        "cells": cells,
    }


def _time_cell(
    workload: Workload, cell: Cell, arms: list[EngineProcess], echo: Callable[[str], None]
) -> dict[str, list[float]]:
    """TPOT in milliseconds of every round, by arm."""
    title = f"{cell.batch} x {cell.context_tokens}"
    prompts = _prompts(workload, cell)
    samples: dict[str, list[float]] = {arm.name: [] for arm in arms}
    echo(f"{title}: priming all arms at once ...")
    with ThreadPoolExecutor(len(arms)) as pool:  # each waits for a process of its own
        for primed in [pool.submit(arm.generate, prompts, 1) for arm in arms]:
            primed.result()
    for round_number in range(workload.rounds):
        # A rotating order: no arm always runs first after another.
        shift = round_number % len(arms)
        for arm in arms[shift:] + arms[:shift]:
            samples[arm.name].append(tpot_ms(arm, prompts, workload))
        line = ", ".join(f"{name} {values[-1]:.1f}" for name, values in samples.items())
        echo(f"{title}: round {round_number + 1} of {workload.rounds}: TPOT ms {line}")
    return samples


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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    work, info = result["workload"], result["machine"]
    lines = [
        f"Decode, distinct random contexts, {Path(work['model']).name}, {work['rounds']} "
        f"alternating rounds, {work['dtype']}, {'eager' if work['is_eager'] else 'compiled'}, "
        f"{info['cpu']}, "
        f"vLLM {info['vllm']}, GPU: {info['gpu']}.",
        "",
        "| requests x context | arm | TPOT ms (median) | TPOT / first arm (median) | spread | "
        "first arm / this |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {cell['batch']} x {cell['context_tokens']} | {name} | {arm['tpot_ms_median']:.1f} "
        f"| {arm['ratio_median']:.3f} | {arm['ratio_min']:.3f} to {arm['ratio_max']:.3f} "
        f"| {1 / arm['ratio_median']:.2f} |"
        for cell in result["cells"]
        for name, arm in cell["arms"].items()
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> bool:
    """Draws the speed-up over the first arm against the context: where it pays and where not.

    Returns:
        False when matplotlib is not installed, or there is only one context to show.
    """
    cells = result["cells"]
    if len({cell["context_tokens"] for cell in cells}) < 2:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=120)
    first, *others = cells[0]["arms"]
    for batch in sorted({cell["batch"] for cell in cells}):
        row = sorted((c for c in cells if c["batch"] == batch), key=lambda c: c["context_tokens"])
        contexts = [cell["context_tokens"] for cell in row]
        for name in others:
            arms = [cell["arms"][name] for cell in row]
            middle = [1 / arm["ratio_median"] for arm in arms]
            spread = [
                [m - 1 / arm["ratio_max"] for m, arm in zip(middle, arms, strict=True)],
                [1 / arm["ratio_min"] - m for m, arm in zip(middle, arms, strict=True)],
            ]
            label = f"{name}, {batch} at once"
            axes.errorbar(contexts, middle, yerr=spread, marker="o", capsize=3, label=label)
    axes.axhline(1, color="grey", linestyle="--", label=first)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({cell["context_tokens"] for cell in cells}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="context, tokens", ylabel=f"TPOT of {first} / TPOT", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True
