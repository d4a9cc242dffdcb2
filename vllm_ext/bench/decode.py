"""Decode time per output token, stock vLLM against ours, in alternating runs.

Every arm is an engine in its own process. Where all fit (always on CPUs) they stay loaded, prime
their contexts at once, then one works at a time; on a GPU that cannot hold them they run one
after another. Contexts are distinct and in the prefix cache, so that only decode
steps are timed: the time per step is
``(t(long) - t(short)) / (long - short)`` over two generation lengths. Where the time to the first
token is asked for, every round brings new contexts, and their prefill is timed before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from attn_backends.config import known_settings, parse_config, settings_of
from attn_backends.methods import REGISTRY, load_method
from vllm_ext.bench.decode_memory import GpuMemory, pool_bytes
from vllm_ext.bench.decode_workload import Cell, Workload
from vllm_ext.bench.machine import machine
from vllm_ext.bench.shapes import reads_anchors
from vllm_ext.engine_process import EngineProcess
from vllm_ext.methods import speculation
from vllm_ext.plugin import DISABLE_ENV

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


@dataclass
class Samples:
    """Milliseconds of every round of one arm in one cell; no TTFT unless it is asked for. Where
    drafts are verified, also the share of them that was accepted, by position.
    """

    tpot_ms: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)

    @property
    def latest(self) -> str:
        """The last round's, for progress lines."""
        first = f" after {self.ttft_ms[-1]:.0f}" if self.ttft_ms else ""
        return f"{self.tpot_ms[-1]:.2f}{first}"


def engine_arguments(
    arm: Arm, workload: Workload, settings: dict[str, Any], gpu_share: float | None
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for one side of the comparison, large enough for every cell.

    Args:
        arm: which one.
        workload: what it must hold.
        settings: of all arms; those that the method does not know are not given to it.
        gpu_share: of the GPU's memory; None on CPUs.
    """
    engine = {
        "model": workload.model,
        "max_model_len": workload.max_model_len,
        "max_num_seqs": max(cell.batch for cell in workload.cells),
        "kv_cache_memory_bytes": pool_bytes(workload),
        "dtype": workload.dtype,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "enforce_eager": workload.is_eager,
        "seed": 0,
    }
    if workload.random_parameters:
        engine["load_format"] = "dummy"
    if workload.compilation_config is not None:
        engine["compilation_config"] = dict(workload.compilation_config)
    if gpu_share is not None:
        engine["gpu_memory_utilization"] = gpu_share
    if arm.engine in REGISTRY:
        own = _own_settings(arm, workload, settings)
        engine |= {"attention_backend": arm.engine}
        engine |= {"additional_config": {"vllm_ext": own}} if own else {}
        if (drafting := speculation(arm.engine, own, workload.model)) is not None:
            engine |= {"speculative_config": drafting, "disable_log_stats": False}
    return engine


def _own_settings(arm: Arm, workload: Workload, settings: dict[str, Any]) -> dict[str, Any]:
    own = known_settings(load_method(arm.engine).config_cls, settings) | arm.settings
    if workload.profile and reads_anchors(arm.engine):
        own = {"profile": workload.profile} | own
    return own


def all_settings(arm: Arm, workload: Workload, settings: dict[str, Any]) -> dict[str, Any]:
    """Every setting of an arm's method, defaults as well; a profile of the benchmark's own is left
    out.

    Raises:
        ConfigError: one that the method refuses.
    """
    if arm.engine not in REGISTRY:
        return {}
    own, config_cls = _own_settings(arm, workload, settings), load_method(arm.engine).config_cls
    config = parse_config(config_cls, own, arm.engine)
    values = {name: getattr(config, name) for name in settings_of(config_cls)}
    if workload.profile and values.get("profile") == workload.profile:
        del values["profile"]
    return values


def _start(arm: Arm, arguments: dict[str, Any]) -> EngineProcess:
    env: dict[str, str | None] = {DISABLE_ENV: "1" if arm.engine == STOCK else None}
    return EngineProcess(arm.name, arguments, env)


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
        Per cell and arm the TPOTs (and TTFTs) of all rounds, their median and spread, the accepted
        share of drafts by position, and the ratio to the baseline of the same round; plus
        workload, machine, all settings of the arms, and whether these ``alternated``.

    Raises:
        ConfigError: a method refuses its settings.
        UserError: an engine did not start, the message has the end of its log; or it would not
            fit the GPU.
    """
    arm_settings = {arm.name: all_settings(arm, workload, settings) for arm in compared}
    memory = GpuMemory.now() if torch.cuda.is_available() else None
    share = memory.engine_share(workload) if memory else None
    alternated = memory is None or memory.engines_at_once(workload) >= len(compared)
    if not alternated:
        echo(f"{len(compared)} engines do not fit the GPU at once: one arm after another")
    samples: dict[Cell, dict[str, Samples]] = {cell: {} for cell in workload.cells}
    for group in [compared] if alternated else [[arm] for arm in compared]:
        engines: list[EngineProcess] = []
        try:
            for arm in group:
                echo(f"{arm.name}: starting ...")
                engines.append(_start(arm, engine_arguments(arm, workload, settings, share)))
            for cell in workload.cells:
                samples[cell] |= _time_cell(workload, cell, engines, echo)
        finally:
            for engine in engines:
                engine.close()
    return {
        "workload": _described(workload),
        "settings": settings,
        "arm_settings": arm_settings,
        "machine": machine(),
        "alternated": alternated,
        "cells": [asdict(cell) | {"arms": summaries(arms)} for cell, arms in samples.items()],
    }


def _described(workload: Workload) -> dict[str, Any]:
    """The workload without paths of files that are gone when the benchmark ends."""
    described = asdict(workload)
    title = described.pop("title")
    del described["profile"]
    return described | {"model": title or workload.model}


def _time_cell(
    workload: Workload, cell: Cell, arms: list[EngineProcess], echo: Callable[[str], None]
) -> dict[str, Samples]:
    """Samples of every round, by arm."""
    samples = {arm.name: Samples() for arm in arms}
    primer = workload.prompts(cell, -1)
    echo(f"{cell}: priming {'all arms' if len(arms) > 1 else arms[0].name} at once ...")
    with ThreadPoolExecutor(len(arms)) as pool:  # each waits for a process of its own
        # A few decode steps, too: what they compile is not timed.
        for primed in [pool.submit(arm.generate, primer, workload.short_tokens) for arm in arms]:
            primed.result()
    drafted = {arm.name: arm.drafts for arm in arms}
    for round_number in range(workload.rounds):
        prompts = workload.prompts(cell, round_number)
        # A rotating order: no arm always runs first after another.
        shift = round_number % len(arms)
        for arm in arms[shift:] + arms[:shift]:
            if workload.times_ttft:
                seconds = arm.generate(prompts, 1)["seconds"]
                samples[arm.name].ttft_ms.append(1000 * float(seconds))
            samples[arm.name].tpot_ms.append(tpot_ms(arm, prompts, workload))
        line = ", ".join(f"{name} {values.latest}" for name, values in samples.items())
        echo(f"{cell}: round {round_number + 1} of {workload.rounds}: ms per token {line}")
    for arm in arms:
        samples[arm.name].accepted = arm.drafts.since(drafted[arm.name]).shares
    return samples


def summaries(arms: dict[str, Samples]) -> dict[str, dict[str, Any]]:
    """What the table shows of every arm; ratios are to the first one in the same round."""
    first = next(iter(arms.values()))
    found = {}
    for name, values in arms.items():
        figures = {"tpot_ms": values.tpot_ms, "tpot_ms_median": statistics.median(values.tpot_ms)}
        figures |= _ratios("", values.tpot_ms, first.tpot_ms)
        if values.accepted:
            figures |= {"accepted": values.accepted}
        if values.ttft_ms:
            figures |= {"ttft_ms": values.ttft_ms}
            figures |= {"ttft_ms_median": statistics.median(values.ttft_ms)}
            figures |= _ratios("ttft_", values.ttft_ms, first.ttft_ms)
        found[name] = figures
    return found


def _ratios(prefix: str, values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    ratios = [value / base for value, base in zip(values, baseline, strict=True)]
    return {
        f"{prefix}ratio_median": statistics.median(ratios),
        f"{prefix}ratio_min": min(ratios),
        f"{prefix}ratio_max": max(ratios),
    }
