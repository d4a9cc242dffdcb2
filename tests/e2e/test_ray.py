"""Two Ray replicas as `make ray` starts them; slow, and nothing else may use the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: scripts/setup.sh ray")

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
KEY = "test-key"
PORT, RAY_PORT = 8300, 8310
METRICS = f"http://127.0.0.2:{RAY_PORT + 6}/metrics"
ROWS = "ray_vllm_ext_decode_rows_total"
REQUESTS = "ray_vllm_request_success_total"
REPORT_S = 15  # Ray's metrics are behind by up to that

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def _environment(**more: str) -> dict[str, str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | more
    env.pop("TRITON_INTERPRET", None)
    return env


@pytest.fixture(scope="module")
def application(
    model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """The running application: its output so far, and when it was ready."""
    log = tmp_path_factory.mktemp("ray") / "log.txt"
    argv = [sys.executable, "-m", "deploy.ray.local", "--port", str(PORT)]
    argv += ["--ray-port", str(RAY_PORT)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, stdout=output, stderr=output, cwd=ROOT, env=_environment(VLLM_API_KEY=KEY)
        )
    started = time.monotonic()
    while b"vllm-ext: ready on" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() - started > 300:
            process.terminate()
            process.wait(timeout=90)
            pytest.fail(f"the application did not start:\n{log.read_text()[-4000:]}")
        time.sleep(0.5)
    yield SimpleNamespace(log=log.read_text())
    process.terminate()
    assert process.wait(timeout=90) == 0


@pytest.fixture
def client(application: SimpleNamespace) -> Any:
    """OpenAI's own client."""
    from openai import OpenAI

    return OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key=KEY, timeout=120)


def _totals(name: str, label: str) -> Counter[str]:
    """A counter of Ray's metrics port, by one of its labels."""
    with urllib.request.urlopen(METRICS, timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    totals: Counter[str] = Counter()
    for line in lines:
        found = re.match(rf'{name}\{{.*\b{label}="([^"]*)".*\}} (\S+)$', line)
        if found:
            totals[found[1]] += int(float(found[2]))
    return totals


def test_it_answers_whole_and_streaming(client: Any) -> None:
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    whole = client.chat.completions.create(
        model=MODEL, messages=question, max_tokens=12, temperature=0
    )
    assert "Paris" in whole.choices[0].message.content
    stream = client.chat.completions.create(
        model=MODEL, messages=question, max_tokens=12, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3


def test_long_prompts_are_served_by_the_method(client: Any) -> None:
    time.sleep(REPORT_S)
    before = _totals(ROWS, "path")
    for number in range(2):
        prompt = [100 + (7 * number + 13 * position) % 9000 for position in range(3000)]
        answer = client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=64,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage.completion_tokens == 64
    time.sleep(REPORT_S)
    after = _totals(ROWS, "path")
    sparse, dense = (after[path] - before[path] for path in ("sparse", "dense"))
    assert sparse + dense >= 2 * 63
    assert sparse / (sparse + dense) > 0.99


def test_a_replicas_engine_is_one_process_that_gives_way(application: SimpleNamespace) -> None:
    """Each process imports vLLM, beside the load; who serves yields to who starts."""
    from deploy.chaos.faults import replicas

    running = replicas(f"127.0.0.2:{RAY_PORT}")
    assert len(running) == 2
    for replica in running:
        family = {"".join(child.cmdline()): child for child in replica.children(recursive=True)}
        assert [title for title in family if title.startswith("VLLM::")] == ["VLLM::EngineCore"]
        assert family["VLLM::EngineCore"].nice() > replica.nice()


def test_a_burst_after_a_pause_is_spread(client: Any) -> None:
    time.sleep(REPORT_S)  # Ray's queue lengths are forgotten by now, too
    before = _totals(REQUESTS, "ReplicaId")
    prompts = [[100 + (7 * i + 17 * k * i) % 9000 for i in range(400)] for k in range(1, 5)]

    def ask(prompt: list[int]) -> None:
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, temperature=0)

    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(ask, prompts))
    time.sleep(REPORT_S)
    after = _totals(REQUESTS, "ReplicaId")
    assert sorted((after - before).values()) == [2, 2]


def test_prompts_without_text_do_not_hang(client: Any) -> None:
    from openai import BadRequestError

    patient = client.with_options(timeout=30, max_retries=0)
    for prompt in ("", [], [17]):
        with suppress(BadRequestError):
            patient.completions.create(model=MODEL, prompt=prompt, max_tokens=1)


def test_the_router_sees_the_prefixes_of_token_ids() -> None:
    from deploy.ray.router import PrefixRouter

    router = object.__new__(PrefixRouter)  # the method needs no cluster

    def text(**request: Any) -> str | None:
        return router._extract_text_from_request(SimpleNamespace(args=[SimpleNamespace(**request)]))

    assert text(prompt=[5, 6]) == text(prompt=[[5, 6], [7]]) == "5 6"
    assert text(prompt="ab") == text(prompt=["a", "b"]) == "ab"
    assert text(messages=[{"role": "user", "content": "hi"}]) == "hi"
    assert text(prompt="") is text(prompt=[]) is text(prompt=None) is text() is None


def test_the_api_key_is_enforced(application: SimpleNamespace) -> None:
    from openai import AuthenticationError, OpenAI

    wrong = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(AuthenticationError):
        wrong.models.list()
    assert KEY not in application.log
    assert "$VLLM_API_KEY" in application.log


def test_options_that_cannot_be_honoured_are_a_400(client: Any) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="budget_tokens"):
        client.completions.create(
            model=MODEL,
            prompt="hi",
            max_tokens=2,
            extra_body={"vllm_xargs": {"budget_tokens": -1}},
        )


def test_a_replica_without_the_extension_refuses_to_start() -> None:
    code = "from deploy.ray.app import require_extension; require_extension()"
    for env, is_refused in (({"VLLM_EXT_DISABLE": "1"}, True), ({}, False)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=_environment(**env),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode != 0) == is_refused, done.stderr
        assert ("vllm-ext is not active in this replica" in done.stderr) == is_refused


def test_without_the_platform_the_methods_name_is_unknown() -> None:
    code = (
        "from vllm.engine.arg_utils import AsyncEngineArgs\n"
        f"AsyncEngineArgs(model='models/{MODEL}', attention_backend='TIDAL_DECODE')"
        ".create_engine_config()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=_environment(VLLM_EXT_DISABLE="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "TIDAL_DECODE" in done.stderr.splitlines()[-1] or "Unknown" in done.stderr
