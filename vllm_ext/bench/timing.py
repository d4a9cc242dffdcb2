"""How calls are timed on each device: one timer per kind."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

MIN_SAMPLE_MS = 5.0  # a sample repeats short calls for about that long
CALIBRATION_CALLS = 3
GRAPH_CALLS = 16  # of a short call in one CUDA graph: between its replays the GPU may wait
HOST_CALLS = 30
BANDWIDTH_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}
BANDWIDTH_TRIES = 5

Run = Callable[..., object]
Calls = Sequence[tuple[Any, ...]]  # arguments of ``run``; each call takes the next ones


class Timed(Protocol):
    """Something that can be timed again and again.

    Attributes:
        host_us: microseconds that the host needs to launch a call on a GPU; None on CPUs.
    """

    host_us: float | None

    def sample_ms(self) -> float:
        """Milliseconds per call, over as many calls as a sample needs."""
        ...


class Timer(Protocol):
    """Makes callables ready to be timed."""

    def prepare(self, run: Run, calls: Calls) -> Timed:
        """Warms up and calibrates.

        Raises:
            Exception: whatever ``run`` raises.
        """
        ...


class _CpuTimed:
    host_us: float | None = None

    def __init__(self, run: Run, calls: Calls) -> None:
        self._run, self._calls = run, itertools.cycle(calls)
        self._calls_per_sample = 1
        # The least of a few: one call alone may be cold or interrupted.
        call_ms = min(self.sample_ms() for _ in range(CALIBRATION_CALLS))
        self._calls_per_sample = math.ceil(MIN_SAMPLE_MS / call_ms)

    def sample_ms(self) -> float:
        calls = [next(self._calls) for _ in range(self._calls_per_sample)]
        started = time.perf_counter()
        for call in calls:
            self._run(*call)
        return 1000 * (time.perf_counter() - started) / len(calls)


class CpuTimer:
    """Times calls by the host's clock."""

    def prepare(self, run: Run, calls: Calls) -> Timed:
        """See ``Timer``."""
        return _CpuTimed(run, calls)


class _CudaTimed:
    def __init__(self, run: Run, calls: Calls) -> None:
        for call in calls:  # compiles and allocates what a graph may not
            run(*call)
        host_us, call_ms = _eager_times(run, calls)
        self.host_us: float | None = host_us
        graph_calls = min(GRAPH_CALLS, math.ceil(MIN_SAMPLE_MS / call_ms))
        repeated = list(calls) * math.ceil(graph_calls / len(calls))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in repeated:
                run(*call)
        self._calls_per_replay, self._replays = len(repeated), 1
        call_ms = min(self.sample_ms() for _ in range(CALIBRATION_CALLS))
        self._replays = math.ceil(MIN_SAMPLE_MS / (call_ms * len(repeated)))

    def sample_ms(self) -> float:
        start, end = (_event() for _ in range(2))
        start.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / (self._replays * self._calls_per_replay)


def _eager_times(run: Run, calls: Calls) -> tuple[float, float]:
    """Microseconds of the host per call, and milliseconds until the GPU has done it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for call in itertools.islice(itertools.cycle(calls), HOST_CALLS):
        run(*call)
    launched_s = time.perf_counter() - started
    torch.cuda.synchronize()
    done_s = time.perf_counter() - started
    return 1e6 * launched_s / HOST_CALLS, 1e3 * done_s / HOST_CALLS


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class CudaTimer:
    """Times replays of a CUDA graph of the calls by the GPU's events: no launch is in it.

    What cannot be captured raises, as it would in an engine under full graphs.
    """

    def prepare(self, run: Run, calls: Calls) -> Timed:
        """See ``Timer``."""
        return _CudaTimed(run, calls)


TIMERS: dict[str, Callable[[], Timer]] = {"cpu": CpuTimer, "cuda": CudaTimer}


def measure_bandwidth(timer: Timer, device_type: str) -> float:
    """Bytes per second that torch moves through memory: the best of several sums and copies."""
    source = torch.ones(BANDWIDTH_BYTES[device_type] // 4, device=device_type)
    target = torch.empty_like(source)
    works: list[tuple[int, Run]] = [
        (source.nbytes, source.sum),
        (2 * source.nbytes, lambda: target.copy_(source)),
    ]
    best = 0.0
    for num_bytes, work in works:
        timed = timer.prepare(work, [()])
        fastest_ms = min(timed.sample_ms() for _ in range(BANDWIDTH_TRIES))
        best = max(best, 1000 * num_bytes / fastest_ms)
    return best
