"""Time of every (op, implementation, batch), each checked against the reference first.

All arms of a batch take turns in one run, and every call of an arm takes the next copy of
the cache, so that a call does not find in the processor's caches what the last one left there.
Where the last-level cache holds all copies, the share of memory bandwidth can pass 100%.
On GPUs calls are replayed as CUDA graphs, and what the host needs to launch one is a figure of
its own.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from attn_backends.ops.dispatch import OpImpl
from vllm_ext.bench.baselines import dense_baselines, engine_kernels
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
from vllm_ext.bench.kernel_report import composed, derived_checks, round_ratio
from vllm_ext.bench.machine import machine
from vllm_ext.bench.timing import TIMERS, Timed, Timer, measure_bandwidth
from vllm_ext.bench.workloads import BatchSpec, Problem, Shape, make_problem

# On a GPU only what a graph can replay; the reference asks the host at every row.
IMPLS = {"cpu": ("cpu", "triton", "reference"), "cuda": ("engine", "triton")}

Echo = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is timed, besides shape and batches."""

    device_type: str  # "cpu" or "cuda"
    ops: tuple[str, ...] = tuple(OPS)
    impls: tuple[str, ...] = ("cpu", "triton")  # of IMPLS
    budget_tokens: int = 512
    budget_share: float | None = None  # of a batch's longest context, instead of budget_tokens
    rounds: int = 9

    def budget_of(self, spec: BatchSpec) -> int:
        """Tokens that sparse_decode may read in a row of this batch."""
        if self.budget_share is None:
            return self.budget_tokens
        longest = max(row.context_tokens for row in spec.rows)
        return max(1, int(longest * self.budget_share))


@dataclass
class Arm:
    """One implementation of one case."""

    case: Case
    impl: OpImpl
    is_baseline: bool
    unsupported: str | None  # why it cannot serve, or what a baseline raised
    failure: str | None = None  # how it disagreed with the reference
    timed: Timed | None = None  # where neither of both
    samples_ms: list[float] = field(default_factory=list)


def run(
    specs: Sequence[BatchSpec], shapes: Sequence[Shape], options: Options, echo: Echo
) -> dict[str, Any]:
    """Checks and times every arm.

    Args:
        specs: the batches.
        shapes: heads and cache geometry, which differ in their block size alone.
        options: which ops and implementations, where and how often.
        echo: progress lines go here.

    Returns:
        ``rows`` (one per arm, batch and shape, see ``_row``), ``checks`` (see
        ``derived_checks``), ``composed`` (on GPUs, see there), ``skipped`` (reason by op by
        implementation), ``bytes_per_second`` of memory, shape, options and machine.
    """
    facts = machine() | {
        "torch_threads": str(torch.get_num_threads()),
        # On a busy machine every parallel call waits for a core now and then.
        "load_average_at_start": f"{os.getloadavg()[0]:.1f}",
    }
    device_type = options.device_type
    timer = TIMERS[device_type]()
    rows: list[dict[str, Any]] = []
    skipped: dict[str, dict[str, str]] = {}
    bytes_per_second = 0.0
    with torch.inference_mode():
        for shape, spec in itertools.product(shapes, specs):
            # Before every batch: what else runs on the machine can change.
            bytes_per_second = max(bytes_per_second, measure_bandwidth(timer, device_type))
            echo(f"memory bandwidth: {bytes_per_second / 1e9:.1f} GB/s")
            problem = make_problem(spec, shape, device_type)
            rows += _batch_rows(problem, options, timer, echo, skipped)
            del problem  # before the next one is made
    for row in rows:
        if "gb_per_s" in row:
            row["bandwidth_share"] = 1e9 * row["gb_per_s"] / bytes_per_second
    flat_tokens = options.budget_tokens if options.budget_share is None else None
    return {
        "shape": asdict(shapes[0]),
        "block_sizes": [shape.block_size for shape in shapes],
        "options": asdict(options),
        "machine": facts,
        "bytes_per_second": bytes_per_second,
        "rows": rows,
        "skipped": skipped,
        "checks": derived_checks(specs, rows, flat_tokens),
        "composed": composed(rows) if device_type == "cuda" else [],
    }


def _batch_rows(
    problem: Problem,
    options: Options,
    timer: Timer,
    echo: Echo,
    skipped: dict[str, dict[str, str]],
) -> list[dict[str, Any]]:
    arms = _run_batch(problem, options, timer, echo)
    for arm in arms:
        if arm.unsupported is not None:
            skipped.setdefault(arm.impl.name, {})[arm.case.op] = arm.unsupported
    return [_row(problem, arm, arms) for arm in arms if arm.unsupported is None]


def _run_batch(problem: Problem, options: Options, timer: Timer, echo: Echo) -> list[Arm]:
    text = f"{problem.spec.text}, blocks of {problem.layout.block_size}"
    megabytes = problem.caches[0].nbytes / 1e6
    echo(f"{text}: {len(problem.caches)} x {megabytes:.0f} MB of keys and values; checking ...")
    if problem.decode is None:
        echo(f"{text}: no rows of one query token, so the decode ops are left out")
    arms = []
    for case in make_cases(problem, options.ops, options.budget_of(problem.spec)):
        is_timed = case.op in options.ops and case.name != DECODE_ATTENTION
        known = OPS[case.op]() + engine_kernels(case.op, options.device_type)
        ours = [impl for impl in known if is_timed and impl.name in options.impls]
        others = dense_baselines(problem.spec, options.device_type) if case.is_baseline else []
        case_arms = [
            Arm(case, impl, impl in others, impl.unsupported_reason(problem.context))
            for impl in ours + others
        ]
        _check(case, case_arms, timer, echo)
        arms += case_arms
    ready = [(arm, arm.timed) for arm in arms if arm.timed is not None]
    for number in range(options.rounds):
        shift = number % max(1, len(ready))
        for arm, timed in ready[shift:] + ready[:shift]:  # none always runs first after another
            arm.samples_ms.append(timed.sample_ms())
        echo(f"{text}: round {number + 1} of {options.rounds}")
    return arms


def _check(case: Case, arms: Sequence[Arm], timer: Timer, echo: Echo) -> None:
    """Sets ``failure``, and ``timed`` where there is none."""
    able = [arm for arm in arms if arm.unsupported is None]
    expected: list[Expected] = expectations(case) if able else []
    for arm in able:
        try:
            arm.failure = mismatch(arm.impl, case, expected)
            if arm.failure is None:
                arm.timed = timer.prepare(arm.impl.run, case.calls)
        except Exception as error:  # whatever a kernel raises is a finding about that kernel
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if arm.is_baseline:  # others refuse by raising what they do not serve
                arm.unsupported = reason
            else:
                arm.failure = reason
        if arm.failure is not None:
            echo(f"FAILED: {arm.impl.name} of {case.name}: {arm.failure}")


def _row(problem: Problem, arm: Arm, arms: Sequence[Arm]) -> dict[str, Any]:
    """One line of the table; without ``ms`` and what follows from it if the check failed.

    ``ratios`` are to the dense baselines for the same rows, by name, or to dense decode of
    the same implementation where no baseline can serve.
    """
    row: dict[str, Any] = {
        "batch": problem.spec.text,
        "block_size": problem.layout.block_size,
        "op": arm.case.name,
        "impl": arm.impl.name,
        "is_baseline": arm.is_baseline,
        "failure": arm.failure,
    }
    if arm.failure is not None or arm.timed is None:
        return row
    rivals, own_dense = {}, {}
    for other in arms:
        name, impl_name = other.case.name, other.impl.name
        if other.samples_ms and other.is_baseline and name == arm.case.baseline:
            rivals[impl_name] = other.samples_ms
        elif other.samples_ms and name == DENSE_DECODE and impl_name == arm.impl.name:
            own_dense[name] = other.samples_ms
    median_ms = statistics.median(arm.samples_ms)
    if arm.timed.host_us is not None:  # a GPU, which can be bound by arithmetic
        row["host_us"] = arm.timed.host_us
        if arm.case.prefill_flops:
            row["tflops"] = arm.case.prefill_flops / median_ms / 1e9
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
