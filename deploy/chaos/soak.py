"""Load at full KV pressure with random aborts, against a running server.

    make serve BACKEND=SINK_WINDOW ARGS='--window-tokens 256 --dtype float32 \
        --kv-cache-memory-bytes 256M --max-num-seqs 16 --max-num-batched-tokens 256 \
        --max-model-len 2200'
    .venv/bin/python -m deploy.chaos.soak --minutes 20 --longest-tokens 2000 --timeout-s 1200

First every prompt is answered alone; then clients ask for them at random, some hanging up
while they wait or read. Every complete answer must equal the one given alone (greedy; serve
in float32, where batching does not move near ties), nothing may fail, and in the end the
server must hold no KV block.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

KV_USE = "vllm:kv_cache_usage_perc"
PREEMPTIONS = "vllm:num_preemptions_total"
FREED = "vllm_ext:kv_blocks_freed_total"
HELD = "vllm_ext:kv_blocks_held"


def make_prompts(source: random.Random, count: int, longest_tokens: int) -> list[list[int]]:
    """Random token ids; a third of them begin like another one."""
    prompts: list[list[int]] = []
    for number in range(count):
        length = source.randrange(longest_tokens // 8, longest_tokens)
        ids = [source.randrange(100, 40_000) for _ in range(length)]
        if number % 3 == 2:
            shared = source.choice(prompts)[: length // 2]
            ids[: len(shared)] = shared
        prompts.append(ids)
    return prompts


class Soak:
    """The clients, and what they saw."""

    def __init__(self, args: argparse.Namespace, client: httpx.AsyncClient) -> None:
        self._args, self._client = args, client
        self._source = random.Random(args.seed)
        self.prompts = make_prompts(self._source, args.prompts, args.longest_tokens)
        self.expected: dict[int, str] = {}
        self.seen: Counter[str] = Counter()
        self.failures: list[str] = []
        self.peak_use = 0.0

    async def answer(self, number: int) -> str:
        """The whole answer to a prompt.

        Raises:
            httpx.HTTPError: the request failed.
        """
        reply = await self._client.post("/v1/completions", json=self._body(number, stream=False))
        reply.raise_for_status()
        return str(reply.json()["choices"][0]["text"])

    def _body(self, number: int, stream: bool) -> dict[str, Any]:
        return {
            "model": self._args.model,
            "prompt": self.prompts[number],
            "max_tokens": self._args.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }

    async def answer_alone(self) -> None:
        """The answers that all later ones must equal."""
        for number in range(len(self.prompts)):
            self.expected[number] = await self.answer(number)
            print(f"alone: {number + 1} of {len(self.prompts)}", end="\r", flush=True)
        print()

    async def client_loop(self, until: float) -> None:
        """One client: asks, compares or hangs up, and asks again."""
        while time.monotonic() < until:
            number = self._source.randrange(len(self.prompts))
            try:
                if self._source.random() < self._args.abort_share:
                    await self._hang_up(number)
                    self.seen["aborted"] += 1
                    continue
                text = await self.answer(number)
            except httpx.HTTPError as error:
                self.failures.append(f"prompt {number}: {error!r}")
                continue
            self.seen["complete"] += 1
            if text != self.expected[number]:
                self.failures.append(f"prompt {number}: {text!r}, not {self.expected[number]!r}")

    async def _hang_up(self, number: int) -> None:
        patience = self._source.uniform(0.05, self._args.patience_s)
        body = self._body(number, stream=True)
        try:
            async with asyncio.timeout(patience):
                async with self._client.stream("POST", "/v1/completions", json=body) as reply:
                    reply.raise_for_status()
                    async for _ in reply.aiter_lines():
                        pass
        except TimeoutError:
            pass

    async def figures(self) -> dict[str, float]:
        """The server's own figures, summed over labels."""
        text = (await self._client.get("/metrics")).text
        totals: dict[str, float] = {}
        for line in text.splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            if name in (KV_USE, PREEMPTIONS, FREED, HELD):
                totals[name] = totals.get(name, 0.0) + float(line.rpartition(" ")[2])
        return totals

    async def watch(self, until: float) -> None:
        """Shows what happens, twice a minute."""
        next_line = 0.0
        while time.monotonic() < until:
            now = await self.figures()
            self.peak_use = max(self.peak_use, now.get(KV_USE, 0.0))
            if time.monotonic() >= next_line:
                next_line = time.monotonic() + 30
                left_s = until - time.monotonic()
                print(
                    f"{left_s:5.0f} s left: {dict(self.seen)}, {len(self.failures)} failures, "
                    f"KV use {now.get(KV_USE, 0):.0%} (peak {self.peak_use:.0%})",
                    flush=True,
                )
            await asyncio.sleep(1)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole soak.

    Returns:
        Counts, failures, and the server's figures before, at the peak and at the end.
    """
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=args.clients + 4)
    async with httpx.AsyncClient(
        base_url=args.url, headers=headers, timeout=args.timeout_s, limits=limits
    ) as client:
        soak = Soak(args, client)
        await soak.answer_alone()
        before = await soak.figures()
        until = time.monotonic() + 60 * args.minutes
        await asyncio.gather(
            soak.watch(until), *(soak.client_loop(until) for _ in range(args.clients))
        )
        await asyncio.sleep(5)  # aborts and the last figures must arrive
        await soak.answer(0)  # a step, so that the gauge is written anew
        await asyncio.sleep(2)
        await soak.answer(0)
        await asyncio.sleep(2)
        end = await soak.figures()
    if end.get(KV_USE, 0.0) > 0:
        soak.failures.append(f"{end[KV_USE]:.2%} of the KV pool is still held")
    return {
        "settings": {
            key: value for key, value in vars(args).items() if key not in ("api_key", "output")
        },
        "requests": dict(soak.seen),
        "failures": soak.failures[:20],
        "num_failures": len(soak.failures),
        "peak_kv_use": soak.peak_use,
        "before": before,
        "end": end,
    }


def main() -> int:
    """Command line; 0 when nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m deploy.chaos.soak", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="served name")
    parser.add_argument("--api-key", default="", help="sent as a bearer token")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--longest-tokens", type=int, default=3000)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--abort-share", type=float, default=0.3, help="of requests, 0 to 1")
    parser.add_argument("--patience-s", type=float, default=20, help="of those that hang up")
    parser.add_argument("--timeout-s", type=float, default=300, help="of all others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write FILE, JSON")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return int(result["num_failures"] > 0)


if __name__ == "__main__":
    sys.exit(main())
