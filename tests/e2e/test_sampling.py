"""What requests may ask of the sampler: seeds, several answers, beams, beside LoRA and the audit.

The server's chunks are small, so that prompts take several, and a burst's share them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deploy.chaos.fuzz_adapter import make_adapter
from tests.e2e.server import Server, running_server

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # what is mended has tests in tests/adapter, too

CHUNK_TOKENS = 256
# float32: batching does not move near ties, so answers can be compared.
FLAGS = ("--attention-backend", "TIDAL_DECODE", "--dtype", "float32", "--min-context-tokens", "64")
SIZES = ("--max-model-len", "1024", "--kv-cache-memory-bytes", str(200 << 20))
CHUNKS = ("--max-num-batched-tokens", str(CHUNK_TOKENS), "--no-enable-prefix-caching")


@pytest.fixture(scope="module")
def server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("sampling") / "log.txt"
    adapter = tmp_path_factory.mktemp("adapter")
    make_adapter(Path(model_path), adapter)
    audit = ("--audit-share", "1")  # every decode step asks for logits twice
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tiny={adapter}")
    with running_server(model_path, log, *FLAGS, *SIZES, *CHUNKS, *audit, *lora) as running:
        yield running


def _ask(server: Server, model_path: str, prompt: Any, **more: Any) -> list[str]:
    body = {"model": model_path, "prompt": prompt, "max_tokens": 8, "temperature": 1.0}
    status, text = server.request("/v1/completions", body | {"ignore_eos": True} | more)
    assert status == 200, text
    if not more.get("stream"):
        return [choice["text"] for choice in json.loads(text)["choices"]]
    texts: dict[int, str] = {}
    for line in text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return [texts[index] for index in sorted(texts)]


def test_a_seed_gives_its_answer_alone_in_chunks_and_beside_others(
    server: Server, model_path: str
) -> None:
    words = [100 + 7 * index % 900 for index in range(600)]
    asked: list[dict[str, Any]] = [
        {"prompt": words[:200], "seed": 1},  # one chunk alone, two in the burst
        {"prompt": words[50:250], "seed": 2},
        {"prompt": words, "seed": 3, "n": 3},
        {"prompt": words, "seed": 3, "n": 3, "stream": True},
        {"prompt": words[:300], "temperature": 0},
    ]
    alone = [_ask(server, model_path, **one) for one in asked]
    assert len(set(alone[2])) == 3
    assert alone[2] == alone[3]
    assert alone[0] != _ask(server, model_path, **asked[0] | {"seed": 5})
    with ThreadPoolExecutor(len(asked)) as pool:
        together = [*pool.map(lambda one: _ask(server, model_path, **one), asked)]
    assert together == alone


def test_the_audit_goes_with_lora(server: Server, model_path: str) -> None:
    before = server.figure("vllm_ext:audit_rows_total")
    prompts = [[100 + index for index in range(n)] for n in (700, 640)]
    _ask(server, model_path, prompts, temperature=0, max_tokens=4)  # two decoding rows
    audited = server.figure("vllm_ext:audit_rows_total") - before
    assert audited >= 3
    assert server.figure("vllm_ext:audit_kl_sum_total") > 0


def test_an_adapter_changes_its_own_answers_only(server: Server, model_path: str) -> None:
    """Of prompts that are scored, too, which ends stock vLLM where two of them meet."""
    prompt = [100 + 3 * index for index in range(120)]
    asked = [
        {"model": name, "prompt": prompt, "temperature": 0, "logprobs": 1, "echo": True}
        for name in (model_path, "tiny", model_path)
    ]

    def score(one: dict[str, Any]) -> tuple[str, list[float]]:
        status, text = server.request("/v1/completions", one | {"max_tokens": 4})
        assert status == 200, text
        choice = json.loads(text)["choices"][0]
        return choice["text"], choice["logprobs"]["token_logprobs"][1:]

    alone = [score(one) for one in asked[:2]]
    assert alone[0] != alone[1], "the adapter changes nothing: nothing is shown"
    for _ in range(3):  # until they share batches
        with ThreadPoolExecutor(3) as pool:
            base, tiny, again = pool.map(score, asked)
        for found, expected in ((base, alone[0]), (tiny, alone[1]), (again, alone[0])):
            assert found[0] == expected[0]
            assert found[1] == pytest.approx(expected[1], abs=1e-3)


def test_every_step_of_a_beam_search_is_counted_as_dense(server: Server, model_path: str) -> None:
    def rows(kind: str) -> float:
        lines = server.request("/metrics")[1].splitlines()
        return sum(float(x.split()[-1]) for x in lines if "decode_rows_total{" in x and kind in x)

    before, all_before = rows('path="dense",reason="beam_search"'), rows("")
    beams = _ask(server, model_path, [5] * 300, use_beam_search=True, n=2, max_tokens=4)
    assert len(beams) == 2
    assert rows('path="dense",reason="beam_search"') - before == 1 + 3 * 2  # one beam, then two
    assert rows("") - all_before == 1 + 3 * 2  # no row of theirs is counted as anything else
