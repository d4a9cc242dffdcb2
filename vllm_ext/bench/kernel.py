"""Time of every (op, implementation, batch), each checked against the reference first.

All arms of a batch take turns in one run, and every call of an arm takes the next copy of
the cache, so that a call does not find in the CPU's caches what the last one left there.
Where the last-level cache holds all copies, the share of memory bandwidth can pass 100%.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from attn_backends.ops.dispatch import OpImpl
from vllm_ext.bench import decode
from vllm_ext.bench.baselines import dense_baselines
from vllm_ext.bench.cases import (
    DECODE_ATTENTION,
    DENSE_DECODE,
    OPS,
    Case,
    Expected,
    expectations,
    make_cases,
    mismatch,
)
from vllm_ext.bench.kernel_report import derived_checks, round_ratio
from vllm_ext.bench.workloads import BatchSpec, Problem, Shape, make_problem

IMPLS = ("cpu", "triton", "reference")
MIN_SAMPLE_MS = 5.0  # a sample repeats short calls for about that long
CALIBRATION_CALLS = 3
BANDWIDTH_BUFFER_BYTES = 512 << 20
BANDWIDTH_TRIES = 5

Echo = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is timed, besides shape and batches."""

    device_type: str  # "cpu" or "cuda"
    ops: tuple[str, ...] = tuple(OPS)
    impls: tuple[str, ...] = ("cpu", "triton")  # of IMPLS
    budget_tokens: int = 512
    rounds: int = 9


@dataclass
class Arm:
    """One implementation of one case."""

    case: Case
    impl: OpImpl
    is_baseline: bool
    unsupported: str | None  # why it cannot serve, or what a baseline raised
    failure: str | None = None  # how it disagreed with the reference
    calls_per_sample: int = 1
    samples_ms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._calls: Iterator[tuple[Any, ...]] = itertools.cycle(self.case.calls)

    def sample_ms(self, device_type: str) -> float:
        """Milliseconds per call, over ``calls_per_sample`` calls."""
        calls = [next(self._calls) for _ in range(self.calls_per_sample)]
        if device_type == "cuda":
            start, end = (_cuda_event() for _ in range(2))
            start.record()
            for call in calls:
                self.impl.run(*call)
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end)) / len(calls)
        started = time.perf_counter()
        for call in calls:
            self.impl.run(*call)
        return 1000 * (time.perf_counter() - started) / len(calls)


def _cuda_event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def run(specs: Sequence[BatchSpec], shape: Shape, options: Options, echo: Echo) -> dict[str, Any]:
    """Checks and times every arm.

    Args:
        specs: the batches.
        shape: heads and cache geometry.
        options: which ops and implementations, where and how often.
        echo: progress lines go here.

    Returns:
        ``rows`` (one per arm and batch, see ``_row``), ``checks`` (see ``derived_checks``),
        ``skipped`` (reason by op by implementation), ``bytes_per_second`` of memory, shape,
        options and machine.
    """
    machine = decode.machine() | {
        "torch_threads": str(torch.get_num_threads()),
        # On a busy machine every parallel call waits for a core now and then.
        "load_average_at_start": f"{os.getloadavg()[0]:.1f}",
    }
    rows: list[dict[str, Any]] = []
    skipped: dict[str, dict[str, str]] = {}
    bytes_per_second = 0.0
    with torch.inference_mode():
        for spec in specs:
            # Before every batch: what else runs on the machine can change.
            bytes_per_second = max(bytes_per_second, measure_bandwidth(options.device_type))
            echo(f"memory bandwidth: {bytes_per_second / 1e9:.1f} GB/s")
            problem = make_problem(spec, shape, options.device_type)
            rows += _batch_rows(problem, options, echo, skipped)
            del problem  # before the next one is made
    for row in rows:
        if "gb_per_s" in row:
            row["bandwidth_share"] = 1e9 * row["gb_per_s"] / bytes_per_second
    return {
        "shape": asdict(shape),
        "options": asdict(options),
        "machine": machine,
        "bytes_per_second": bytes_per_second,
        "rows": rows,
        "skipped": skipped,
        "checks": derived_checks(specs, rows, options.budget_tokens),
    }


def measure_bandwidth(device_type: str) -> float:
    """Bytes per second that torch moves through memory: the best of several sums and copies."""
    source = torch.ones(BANDWIDTH_BUFFER_BYTES // 4, device=device_type)
    target = torch.empty_like(source)
    works: list[tuple[int, Callable[[], object]]] = [
        (source.nbytes, source.sum),
        (2 * source.nbytes, lambda: target.copy_(source)),
    ]
    best = 0.0
    for _ in range(BANDWIDTH_TRIES):
        for num_bytes, work in works:
            _synchronize(device_type)
            started = time.perf_counter()
            work()
            _synchronize(device_type)
            best = max(best, num_bytes / (time.perf_counter() - started))
    return best


def _synchronize(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


def _batch_rows(
    problem: Problem, options: Options, echo: Echo, skipped: dict[str, dict[str, str]]
) -> list[dict[str, Any]]:
    arms = _run_batch(problem, options, echo)
    for arm in arms:
        if arm.unsupported is not None:
            skipped.setdefault(arm.impl.name, {})[arm.case.op] = arm.unsupported
    return [_row(problem.spec.text, arm, arms) for arm in arms if arm.unsupported is None]


def _run_batch(problem: Problem, options: Options, echo: Echo) -> list[Arm]:
    text, device_type = problem.spec.text, options.device_type
    megabytes = problem.caches[0].nbytes / 1e6
    echo(f"{text}: {len(problem.caches)} x {megabytes:.0f} MB of keys and values; checking ...")
    if problem.decode is None:
        echo(f"{text}: no rows of one query token, so the decode ops are left out")
    arms = []
    for case in make_cases(problem, options.ops, options.budget_tokens):
        is_timed = case.op in options.ops and case.name != DECODE_ATTENTION
        ours = [impl for impl in OPS[case.op]() if is_timed and impl.name in options.impls]
        others = dense_baselines(problem.spec, device_type) if case.is_baseline else []
        case_arms = [
            Arm(case, impl, impl in others, impl.unsupported_reason(problem.context))
            for impl in ours + others
        ]
        _check(case, case_arms, device_type, echo)
        arms += case_arms
    timed = [arm for arm in arms if arm.unsupported is None and arm.failure is None]
    for number in range(options.rounds):
        shift = number % max(1, len(timed))
        for arm in timed[shift:] + timed[:shift]:  # no arm always runs first after another
            arm.samples_ms.append(arm.sample_ms(device_type))
        echo(f"{text}: round {number + 1} of {options.rounds}")
    return arms


def _check(case: Case, arms: Sequence[Arm], device_type: str, echo: Echo) -> None:
    """Sets ``failure``, and ``calls_per_sample`` where there is none."""
    able = [arm for arm in arms if arm.unsupported is None]
    expected: list[Expected] = expectations(case) if able else []
    for arm in able:
        try:
            arm.failure = mismatch(arm.impl, case, expected)
            if arm.failure is None:
                # The least of a few: one call alone may be cold or interrupted.
                call_ms = min(arm.sample_ms(device_type) for _ in range(CALIBRATION_CALLS))
                arm.calls_per_sample = math.ceil(MIN_SAMPLE_MS / call_ms)
        except Exception as error:  # whatever a kernel raises is a finding about that kernel
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if arm.is_baseline:  # others refuse by raising what they do not serve
                arm.unsupported = reason
            else:
                arm.failure = reason
        if arm.failure is not None:
            echo(f"FAILED: {arm.impl.name} of {case.name}: {arm.failure}")


def _row(batch_text: str, arm: Arm, arms: Sequence[Arm]) -> dict[str, Any]:
    """One line of the table; without ``ms`` and what follows from it if the check failed.

    ``ratios`` are to the dense baselines for the same rows, by name, or to dense decode of
    the same implementation where no baseline can serve.
    """
    row: dict[str, Any] = {
        "batch": batch_text,
        "op": arm.case.name,
        "impl": arm.impl.name,
        "is_baseline": arm.is_baseline,
        "failure": arm.failure,
    }
    if arm.failure is not None:
        return row
    rivals, own_dense = {}, {}
    for other in arms:
        name, impl_name = other.case.name, other.impl.name
        if other.samples_ms and other.is_baseline and name == arm.case.baseline:
            rivals[impl_name] = other.samples_ms
        elif other.samples_ms and name == DENSE_DECODE and impl_name == arm.impl.name:
            own_dense[name] = other.samples_ms
    median_ms = statistics.median(arm.samples_ms)
    return row | {
        "ms": arm.samples_ms,
        "ms_median": median_ms,
        "read_bytes": arm.case.read_bytes,
        "gb_per_s": arm.case.read_bytes / median_ms / 1e6,
        "ratios": {
            name: round_ratio(arm.samples_ms, rival)
            for name, rival in (rivals or own_dense).items()
        },
    }
