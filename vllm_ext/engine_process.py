"""An engine in a process of its own; for benchmarks and evaluation."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attn_backends.checkpoint import read_model_config
from vllm_ext.child import Child, Parent, quiet_environment

DTYPES = ("auto", "bfloat16", "float16", "float32")
_CPU_INFO = Path("/proc/cpuinfo")
# vLLM does not start where less of a GPU is free than its share, even if the KV pool's size is
# given and little more is needed; others may be at work there.
SMALL_GPU_SHARE = 0.05


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


@dataclass(frozen=True)
class Drafts:
    """What an engine drafted.

    Attributes:
        num_drafts: rows of steps that verified drafts.
        accepted: of these, how many accepted the draft at each position.
    """

    num_drafts: int
    accepted: Sequence[int]

    def since(self, before: Drafts) -> Drafts:
        """What was drafted after ``before``."""
        earlier = before.accepted or [0] * len(self.accepted)
        accepted = [now - then for now, then in zip(self.accepted, earlier, strict=True)]
        return Drafts(self.num_drafts - before.num_drafts, accepted)

    @property
    def shares(self) -> list[float]:
        """Of each position."""
        return [accepted / self.num_drafts for accepted in self.accepted if self.num_drafts]


class EngineProcess:
    """A running engine.

    Args:
        name: for messages.
        engine: keyword arguments of ``vllm.LLM``.
        env: additions to the environment; None removes a variable.

    Attributes:
        drafts: what it drafted so far, where it verifies drafts.

    Raises:
        UserError: the engine did not start; the message has the end of its log.
    """

    def __init__(self, name: str, engine: dict[str, Any], env: dict[str, str | None]) -> None:
        self.name = name
        self.drafts = Drafts(0, ())
        self._child = Child(f"{name} engine", "vllm_ext.engine_process", quiet_environment(env))
        try:
            self._child.ask(engine)
        except BaseException:
            self._child.close()
            raise

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
        answer: dict[str, Any] = self._child.ask(request)
        if answer.get("drafts"):
            self.drafts = Drafts(**answer["drafts"])
        return answer

    def close(self) -> None:
        """Stops the engine."""
        self._child.close()


def _serve(parent: Parent) -> None:
    """The first request makes the engine, the others generate."""
    requests = iter(parent)
    engine = next(requests)
    from vllm import LLM

    llm = LLM(**engine)
    parent.answer("ready")
    for request in requests:
        answer = _generate(llm, request) | {"forced": _forced(engine)}
        if engine.get("speculative_config"):
            answer["drafts"] = asdict(drafts_of(llm))
        parent.answer(answer)


def _generate(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

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
    return {
        "seconds": time.perf_counter() - started,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "scores": [_scores(output) for output in outputs if output.prompt_logprobs],
    }


def drafts_of(llm: Any) -> Drafts:
    """From vLLM's own counters of an engine that drafts and keeps statistics."""
    prefix = "vllm:spec_decode_num_"
    metrics = {metric.name.removeprefix(prefix): metric for metric in llm.get_metrics()}
    positions = metrics["accepted_tokens_per_pos"].values
    return Drafts(metrics["drafts"].value, list(positions))


def _scores(output: Any) -> list[float]:
    ids = output.prompt_token_ids
    return [
        position[token].logprob
        for token, position in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]


def _forced(engine: dict[str, Any]) -> dict[str, Any]:
    if not engine.get("logits_processors"):
        return {}
    from vllm_ext.forcing import ForcingProcessor

    found = {name: list(steps.values()) for name, steps in ForcingProcessor.results.items()}
    ForcingProcessor.results.clear()
    return found


if __name__ == "__main__":
    _serve(Parent())
