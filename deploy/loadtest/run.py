"""The run: arm by arm, cell by cell, within its bounds of time."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy.loadtest import grid
from deploy.loadtest.client import BenchClient, ClientFailed, OutOfTime, Target, summarise
from deploy.loadtest.endpoint import Figures, Watch, served_model
from deploy.loadtest.server import StartedServer
from deploy.loadtest.store import Store
from vllm_ext.errors import UserError

START_LIMIT_S = 300.0
WARM_UP_LIMIT_S = 300.0


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    Attributes:
        name: in the report.
        url: of the server or ingress, without ``/v1``.
        metrics_url: the page with its figures; Ray's is on another port.
        serve_words: words after ``vllm-ext`` that start it; None for one that runs already.
    """

    name: str
    url: str
    metrics_url: str
    serve_words: tuple[str, ...] | None = None

    def definition(self) -> dict[str, Any]:
        """What the results file keeps; figures of another definition are not continued."""
        words = list(self.serve_words) if self.serve_words else None
        return {"url": self.url, "metrics_url": self.metrics_url, "serve": words}


@dataclass(frozen=True)
class Plan:
    """What a run does, beside its arms.

    Attributes:
        cells: asked of every arm.
        slo: bounds in milliseconds, by vLLM's names.
        tokenizer: folder or name; None is the served model's own.
        seed: of the prompts.
        deadline_s: on ``time.monotonic()``'s clock.
        client_env: environment of the load generator.
    """

    cells: list[grid.Cell]
    slo: dict[str, float]
    tokenizer: str | None
    seed: int
    deadline_s: float
    client_env: dict[str, str]

    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline_s - time.monotonic()


def tokenizer_of(root: str) -> str:
    """The folder of a served model. Ray's model list has the model's id only: that of a model in
    ``models/``, as ``make ray`` serves it, means the folder.
    """
    local = Path("models", root)
    return str(local) if not Path(root).is_dir() and local.is_dir() else root


def run(arms: list[Arm], plan: Plan, store: Store, echo: Callable[[str], None]) -> None:
    """Runs every cell that the store does not have.

    Args:
        arms: one after another; the first is what the report compares with.
        plan: what to do.
        store: gets every record as soon as it is there.
        echo: progress lines go here.
    """
    for arm in arms:
        store.add_arm(arm.name, arm.definition())
    for number, arm in enumerate(arms):
        todo = [cell for cell in plan.cells if not store.has(arm.name, cell)]
        if len(todo) < len(plan.cells):
            echo(f"{arm.name}: {len(plan.cells) - len(todo)} cells are finished already")
        done_before = number * len(plan.cells) + len(plan.cells) - len(todo)
        if not todo:
            continue
        progress = _Progress(done_before, len(arms) * len(plan.cells), echo)
        try:
            _run_arm(arm, todo, plan, store, progress)
        except UserError as error:  # this arm is lost, the others are not
            echo(f"{arm.name}: {error}")
            for cell in todo:
                if not store.has(arm.name, cell):
                    store.add_not_run(arm.name, cell, str(error))


class _Progress:
    """Numbers the cells in progress lines."""

    def __init__(self, done: int, total: int, echo: Callable[[str], None]) -> None:
        self._done, self._total, self.echo = done, total, echo

    def note(self, text: str) -> None:
        self._done += 1
        self.echo(f"[{self._done} of {self._total}] {text}")


@contextlib.contextmanager
def _up(arm: Arm, plan: Plan, echo: Callable[[str], None]) -> Iterator[None]:
    if arm.serve_words is None:
        yield
        return
    if plan.left_s() <= 0:
        raise UserError("no time was left to start the server")
    echo(f"{arm.name}: starting vllm-ext {' '.join(arm.serve_words)}")
    limit_s = min(START_LIMIT_S, plan.left_s())
    with StartedServer(arm.name, list(arm.serve_words), arm.url, limit_s):
        yield


def _run_arm(
    arm: Arm, todo: list[grid.Cell], plan: Plan, store: Store, progress: _Progress
) -> None:
    with _up(arm, plan, progress.echo):
        name, root = served_model(arm.url)
        target = Target(arm.url, name, plan.tokenizer or tokenizer_of(root), plan.slo)
        client = BenchClient(plan.client_env)
        try:
            progress.echo(f"{arm.name}: warming up")
            limit_s = min(WARM_UP_LIMIT_S, plan.left_s())
            warm_up = client.run(target, grid.warm_up_trace(plan.seed), 1, limit_s)
            if warm_up["failed"]:
                raise UserError(f"{arm.url} failed the warm-up request: {warm_up['errors'][0]}")
            cells = _Cells(arm, plan, target, client)
            for cell in todo:
                _run_cell(cells, cell, store, progress)
        except (ClientFailed, OutOfTime) as error:
            what = str(error).strip().splitlines()[-1]  # of a traceback
            raise UserError(f"the warm-up failed: {what}\n{error}") from None
        finally:
            client.close()


class _Cells:
    """Measures the cells of one arm.

    A settled reading of Ray's metrics takes its time: the last one of a cell is the first one
    of the next, unless something was asked in between.
    """

    def __init__(self, arm: Arm, plan: Plan, target: Target, client: BenchClient) -> None:
        self.arm, self._plan, self._target, self._client = arm, plan, target, client
        self._last: Figures | None = None

    def measure(self, cell: grid.Cell) -> dict[str, Any]:
        """The cell's figures, for its record.

        Raises:
            OutOfTime: the run's time is over.
            ClientFailed: the load generator failed, or requests that fill the prefix cache did.
            UserError: /metrics does not answer.
        """
        plan, before = self._plan, self._last
        if plan.left_s() <= 0:
            raise OutOfTime("no time was left (--max-minutes)")
        self._last = None
        if priming := grid.priming_trace(cell, plan.seed):
            before = None
            primed = self._client.run(self._target, priming, 1, plan.left_s())
            if primed["failed"]:
                errors = primed["errors"]
                raise ClientFailed(f"requests that fill the prefix cache failed: {errors}")
        lines = grid.trace(cell, plan.seed)
        with Watch(self.arm.metrics_url, before) as watch:
            result = self._client.run(self._target, lines, cell.max_in_flight, plan.left_s())
        wanted_tokens = [json.loads(line)["output_length"] for line in lines]
        record = summarise(result, wanted_tokens) | {"server": watch.result()}
        self._last = watch.after
        return record


def _run_cell(cells: _Cells, cell: grid.Cell, store: Store, progress: _Progress) -> None:
    name = cells.arm.name
    record: dict[str, Any] = {"arm": name, "cell": asdict(cell), "failure": None}
    record["measured_on"] = datetime.now(UTC).date().isoformat()
    try:
        record |= cells.measure(cell)
    except OutOfTime as error:
        store.add_not_run(name, cell, str(error))
        progress.note(f"{name}, {cell}: not run: {error}")
        return
    except (ClientFailed, UserError) as error:
        record["failure"] = str(error)
        progress.note(f"{name}, {cell}: FAILED: {str(error).strip().splitlines()[-1]}")
    else:
        progress.note(f"{name}, {cell}: {_line(record)}")
    store.add(record)


def _line(record: dict[str, Any]) -> str:
    medians = ", ".join(
        f"{name.upper()} {value:.0f} ms"
        for name in ("ttft", "tpot")
        if (value := record["latency_ms"][name]["p50"]) is not None
    )
    wrong = f"{record['failed']} failed, {record['cut_short']} cut short"
    return f"{medians or 'no answer'}; {wrong} ({record['duration_s']:.0f} s)"
