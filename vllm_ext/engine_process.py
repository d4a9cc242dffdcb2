"""An engine in a process of its own, driven by JSON lines; for benchmarks and evaluation.

vLLM keeps process-wide state, so that two engines to compare need two processes.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attn_backends.profile import read_model_config
from vllm_ext.errors import UserError

_MARK = "@@vllm-ext "
DTYPES = ("auto", "bfloat16", "float16", "float32")
_CPU_INFO = Path("/proc/cpuinfo")


def cpu_dtype() -> str:
    """The dtype that suits a checkpoint in bf16 on this CPU: ``auto``, which keeps it, or
    ``float32`` where bf16 has no instructions. There torch multiplies bf16 matrices about
    nine times slower than fp32 ones (measured on an AVX2 EPYC, docs/measurements.md).
    """
    if platform.machine() != "x86_64" or not _CPU_INFO.exists():
        return "auto"
    return "auto" if "avx512" in _CPU_INFO.read_text() else "float32"


def kv_token_bytes(model: str, dtype: str) -> int:
    """Bytes of keys and values of one token in all layers.

    Args:
        model: folder with ``config.json``.
        dtype: of ``DTYPES``; ``auto`` is taken for 16 bit.
    """
    config = read_model_config(Path(model))
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    element_bytes = 4 if dtype == "float32" else 2
    return int(config["num_hidden_layers"] * 2 * heads * head_size * element_bytes)


class EngineProcess:
    """A running engine.

    Args:
        name: for messages.
        engine: keyword arguments of ``vllm.LLM``.
        env: additions to the environment; None removes a variable.

    Raises:
        UserError: the engine did not start; the message has the end of its log.
    """

    def __init__(self, name: str, engine: dict[str, Any], env: dict[str, str | None]) -> None:
        self.name = name
        full_env: dict[str, str | None] = dict(os.environ)
        full_env |= {"VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"} | env
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_ext.engine_process", json.dumps(engine)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={key: value for key, value in full_env.items() if value is not None},
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(_MARK))
                return answer
        self._log.seek(0)
        tail = "".join(self._log.readlines()[-25:])
        raise UserError(f"the {self.name} engine ended; the end of its log:\n{tail}")

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        extra_args: Sequence[dict[str, Any] | None] | None = None,
    ) -> dict[str, Any]:
        """Greedy generation of exactly ``max_tokens`` for every prompt of token ids.

        Returns:
            ``seconds``, ``tokens`` (ids per prompt) and ``forced``, what ``ForcingProcessor``
            collected.
        """
        return self._ask({"prompts": prompts, "max_tokens": max_tokens, "extra_args": extra_args})

    def score(self, prompts: list[list[int]]) -> list[list[float]]:
        """Log-probability of every token of every prompt but its first."""
        answer = self._ask({"prompts": prompts, "max_tokens": 1, "scores_prompts": True})
        scores: list[list[float]] = answer["scores"]
        return scores

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Stops the engine."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


def _serve(engine: dict[str, Any]) -> None:
    """Answers requests from standard input until it closes."""
    from vllm import LLM, SamplingParams

    llm = LLM(**engine)
    print(_MARK + json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=request["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                extra_args=extra_args,
                prompt_logprobs=0 if request.get("scores_prompts") else None,
            )
            for extra_args in request.get("extra_args") or [None] * len(prompts)
        ]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answer = {
            "seconds": time.perf_counter() - started,
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "forced": _forced() if engine.get("logits_processors") else {},
            "scores": [_scores(output) for output in outputs if output.prompt_logprobs],
        }
        print(_MARK + json.dumps(answer), flush=True)


def _scores(output: Any) -> list[float]:
    ids = output.prompt_token_ids
    return [
        position[token].logprob
        for token, position in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]


def _forced() -> dict[str, Any]:
    from vllm_ext.forcing import ForcingProcessor

    found = dict(ForcingProcessor.results)
    ForcingProcessor.results.clear()
    return found


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
