"""Runs jobs on a vLLM engine in a process of its own and writes the results as JSON.

``python -m tests.e2e.engine SPEC.json RESULT.json``; see ``run_engine`` for the format.
One engine per process: vLLM keeps process-wide state.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_engine(
    engine: dict[str, Any], jobs: list[dict[str, Any]], env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Starts an engine, runs jobs in order, stops it.

    Args:
        engine: keyword arguments of ``vllm.LLM``.
        jobs: each ``{"prompts": [[ids]], "together": bool, "max_tokens": n}``, and optionally
            ``"extra_args"``, one object or null per prompt.
        env: additions to the environment.

    Returns:
        ``{"jobs": [[{"tokens": [...], "logprobs": [[id, logprob], ...]}]], "rows": {...},
        "preemptions": n}`` with the logprob of each generated token.

    Raises:
        RuntimeError: the engine failed; the message ends with its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec, result = Path(folder, "spec.json"), Path(folder, "result.json")
        spec.write_text(json.dumps({"engine": engine, "jobs": jobs}))
        full_env = {
            key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"
        } | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
            **(env or {}),
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.e2e.engine", str(spec), str(result)],
            cwd=ROOT,
            env=full_env,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode != 0:
            raise RuntimeError(f"engine {engine} failed:\n{done.stderr[-6000:]}")
        answer: dict[str, Any] = json.loads(result.read_text())
        return answer


def _generate(llm: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    extra_args = job.get("extra_args") or [None] * len(job["prompts"])
    requests = [
        (
            {"prompt_token_ids": ids},
            SamplingParams(
                temperature=0,
                max_tokens=job["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                extra_args=extra,
            ),
        )
        for ids, extra in zip(job["prompts"], extra_args, strict=True)
    ]
    batches = [requests] if job["together"] else [[request] for request in requests]
    answers = []
    for batch in batches:
        prompts, params = [list(column) for column in zip(*batch, strict=True)]
        for output in llm.generate(prompts, params, use_tqdm=False):
            completion = output.outputs[0]
            tokens = list(completion.token_ids)
            answers.append(
                {
                    "tokens": tokens,
                    "logprobs": [
                        step[token].logprob
                        for step, token in zip(completion.logprobs, tokens, strict=True)
                    ],
                }
            )
    return answers


def _main(spec_path: str, result_path: str) -> None:
    from vllm import LLM

    spec = json.loads(Path(spec_path).read_text())
    llm = LLM(**{"disable_log_stats": False, "seed": 0, **spec["engine"]})
    jobs = [_generate(llm, job) for job in spec["jobs"]]
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    rows = {}
    if not os.environ.get("VLLM_EXT_DISABLE"):
        from vllm_ext.metrics import decode_rows

        rows = {"|".join(key): value for key, value in decode_rows().items()}
    result = {"jobs": jobs, "rows": rows, "preemptions": metrics["vllm:num_preemptions"]}
    Path(result_path).write_text(json.dumps(result))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    _main(*sys.argv[1:])
