"""What clients see when a replica dies, against the Ray application of this machine.

    make ray
    .venv/bin/python -m deploy.chaos.faults --targets actor,engine \
        --output docs/benchmarks/ray-faults-cpu

Bounded load of streaming and other requests; one replica (its actor, or the engine process
below it) is killed with SIGKILL; every request is recorded until all replicas serve again.
Only processes below the Ray node at ``--ray-address`` are killed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from deploy.ray.local import join
from vllm_ext.bench.machine import machine

ANSWER, ERROR, CUT, HANG, REFUSED = "answer", "clean error", "cut stream", "hang", "no answer"
OUTCOMES = (ANSWER, ERROR, CUT, HANG, REFUSED)
SETTLE_S = 10.0  # load before the kill, and after everything is back
WORDS = [
    "river", "stone", "music", "window", "garden", "winter",
    "letter", "yellow", "market", "engine", "paper", "silver",
]  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One request and its end; times are seconds since the kill."""

    streams: bool
    began_s: float
    ended_s: float
    outcome: str
    detail: str


def judge_stream(lines: list[str]) -> tuple[str, str]:
    """Outcome and detail of a stream that ended.

    Args:
        lines: as received, of server-sent events.
    """
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    for event in events:
        if event.startswith("{") and "error" in (body := json.loads(event)):
            return ERROR, f"event: {body['error'].get('message', '')}"
    return (ANSWER, "") if events[-1:] == ["[DONE]"] else (CUT, f"{len(events)} events, no [DONE]")


class Load:
    """Clients that ask one request after the other."""

    def __init__(self, args: argparse.Namespace, client: httpx.AsyncClient) -> None:
        self._args, self._client = args, client
        self._source = random.Random(args.seed)
        self._stop = asyncio.Event()
        self.done: list[tuple[bool, float, float, str, str]] = []

    async def run(self) -> None:
        """Until ``stop``."""
        await asyncio.gather(*(self._client_loop(n % 2 == 0) for n in range(self._args.clients)))

    def stop(self) -> None:
        """Clients end with their present requests."""
        self._stop.set()

    async def _client_loop(self, streams: bool) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._args.timeout_s):
                    outcome, detail = await self._ask(streams)
            except TimeoutError:
                outcome, detail = HANG, f"nothing within {self._args.timeout_s} s"
            except httpx.HTTPError as error:
                outcome, detail = REFUSED, repr(error)
            self.done.append((streams, began, time.monotonic(), outcome, detail))
            if outcome != ANSWER:
                await asyncio.sleep(self._args.pause_s)  # as a client that retries would

    async def _ask(self, streams: bool) -> tuple[str, str]:
        words = self._source.choices(WORDS, k=self._args.prompt_words)
        body = {
            "model": self._args.model,
            "prompt": f"{self._source.random()} " + " ".join(words),
            "max_tokens": self._args.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": streams,
        }
        async with self._client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                text = (await reply.aread()).decode(errors="replace")
                is_clean = "application/json" in reply.headers.get("content-type", "")
                return ERROR if is_clean else REFUSED, f"{reply.status_code}: {text[:160]}"
            if streams:
                return judge_stream([line async for line in reply.aiter_lines()])
            choices = json.loads(await reply.aread())["choices"]
        return (ANSWER, "") if choices[0]["text"] else (CUT, "an empty answer")


def replicas(ray_address: str) -> list[psutil.Process]:
    """The model replicas' actors below the node that joined ``ray_address``."""
    nodes = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(ray_address in word for word in process.info["cmdline"] or [])
        and "raylet" in (process.info["cmdline"] or [""])[0]
    ]
    return [
        child
        for node in nodes
        for child in node.children(recursive=True)
        if " ".join(_command(child)).startswith("ray::ServeReplica:")
        and "LLMServer" in " ".join(_command(child))
    ]


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return []


def victim_of(target: str, replica: psutil.Process) -> psutil.Process:
    """The process to kill.

    Raises:
        RuntimeError: the replica has no engine process.
    """
    if target == "actor":
        return replica
    for child in replica.children(recursive=True):
        if "EngineCore" in " ".join(_command(child)):
            return child
    raise RuntimeError(f"replica {replica.pid} has no engine process")


def num_serving() -> int:
    """Model replicas that Serve calls running."""
    from ray import serve

    return sum(
        deployment.replica_states.get("RUNNING", 0)
        for application in serve.status().applications.values()
        for name, deployment in application.deployments.items()
        if "LLMServer" in name
    )


async def one_fault(args: argparse.Namespace, target: str) -> dict[str, Any]:
    """Load, a kill, and everything until all replicas serve again.

    Raises:
        RuntimeError: there were not two replicas to begin with.
    """
    before = {replica.pid for replica in replicas(args.ray_address)}
    if len(before) < 2 or await asyncio.to_thread(num_serving) < len(before):
        raise RuntimeError(f"two running replicas are needed, found processes {sorted(before)}")
    headers = {}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    async with httpx.AsyncClient(base_url=args.url, headers=headers, timeout=None) as client:
        load = Load(args, client)
        clients = asyncio.create_task(load.run())
        await asyncio.sleep(SETTLE_S)
        replica = psutil.Process(min(before))
        victim = victim_of(target, replica)
        killed = time.monotonic()
        victim.kill()
        print(f"{target}: killed process {victim.pid}", flush=True)
        back_s, was_seen_down = None, False
        while time.monotonic() - killed < args.give_up_s:
            await asyncio.sleep(0.5)
            serving = await asyncio.to_thread(num_serving)
            was_seen_down = was_seen_down or serving < len(before)
            if was_seen_down and serving == len(before):
                back_s = time.monotonic() - killed
                break
        print(f"{target}: all replicas serve again after {back_s} s", flush=True)
        await asyncio.sleep(SETTLE_S)
        load.stop()
        await clients
    done = [
        Request(streams, began - killed, ended - killed, outcome, detail)
        for streams, began, ended, outcome, detail in load.done
    ]
    return {"target": target, **summary(done, back_s)}


def summary(done: list[Request], back_s: float | None) -> dict[str, Any]:
    """Figures of one fault.

    Args:
        done: all requests.
        back_s: until all replicas served again, or None.
    """
    failed = [request for request in done if request.outcome != ANSWER]
    counts = Counter((request.outcome, request.streams) for request in done)
    return {
        "requests": len(done),
        "back_s": None if back_s is None else round(back_s, 1),
        "outcomes": {
            outcome: {"streaming": counts[outcome, True], "other": counts[outcome, False]}
            for outcome in OUTCOMES
        },
        "last_failure_s": round(max((r.ended_s for r in failed), default=0.0), 1),
        "longest_request_s": round(max((r.ended_s - r.began_s for r in done), default=0.0), 1),
        "failures": [asdict(request) for request in failed],
    }


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, one row per fault."""
    lines = [
        "| killed | requests | " + " | ".join(OUTCOMES) + " | last failure | all back |",
        "|---" * (len(OUTCOMES) + 4) + "|",
    ]
    for result in results:
        cells = [result["target"], str(result["requests"])]
        for outcome in OUTCOMES:
            count = result["outcomes"][outcome]
            total = count["streaming"] + count["other"]
            cells.append(f"{total} ({count['streaming']} streaming)" if total else "0")
        back = "never" if result["back_s"] is None else f"{result['back_s']} s"
        cells += [f"{result['last_failure_s']} s", back]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


async def _run(args: argparse.Namespace, targets: list[str]) -> list[dict[str, Any]]:
    return [await one_fault(args, target) for target in targets]


def main() -> int:
    """Command line; 0 when every request ended cleanly and all replicas came back."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.chaos.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--ray-address", default="127.0.0.2:8310")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="served name")
    parser.add_argument("--targets", default="actor,engine", help="what to kill, in turn")
    parser.add_argument("--clients", type=int, default=4, help="every second one streams")
    parser.add_argument("--prompt-words", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--timeout-s", type=float, default=60, help="then a request hangs")
    parser.add_argument("--pause-s", type=float, default=0.5, help="after a failed request")
    parser.add_argument("--give-up-s", type=float, default=180, help="on a replica's return")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write FILE.json and FILE.md")
    args = parser.parse_args()
    targets = args.targets.split(",")
    if unknown := set(targets) - {"actor", "engine"}:
        parser.error(f"--targets has {', '.join(unknown)}; choose from actor, engine")
    join(args.ray_address)
    results = asyncio.run(_run(args, targets))
    print(text := table(results))
    if args.output:
        settings = {key: str(value) for key, value in vars(args).items()}
        report = {"settings": settings, "machine": machine(), "faults": results}
        args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(text)
    is_clean = all(
        not any(sum(result["outcomes"][outcome].values()) for outcome in (CUT, HANG, REFUSED))
        and result["back_s"] is not None
        for result in results
    )
    return int(not is_clean)


if __name__ == "__main__":
    sys.exit(main())
