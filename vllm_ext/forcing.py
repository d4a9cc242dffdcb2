"""A logits processor that compares distributions step by step along the same tokens.

Dense's log-probabilities are written to a file; any engine that is then forced along dense's
tokens reports the KL divergence and the top-1 agreement of its own raw ones. The full
vocabulary counts, and nothing is copied through vLLM's log-probability objects.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as RunnerV2LogitsProcessor,
)

KEY = "vllm_ext_eval"  # in a request's extra_args
CLASS_PATH = f"{__name__}:ForcingProcessor"


class ForcingProcessor(LogitsProcessor, RunnerV2LogitsProcessor):
    """Per request ``{KEY: {"file": path, "tokens": null | [ids]}}``, on either model runner of
    vLLM: CPUs have the first, GPUs the second.

    Without tokens: a request decodes freely, its log-probabilities are written to the file
    at the end. With tokens: they are forced, and ``[kl, agrees]`` per step is collected in
    ``results`` under the request's ``"name"``, by file and step: vLLM samples after every chunk of
    a prompt, and what stands there in the end is of the last one.
    """

    # read by the worker process
    results: dict[str, dict[tuple[str, int], tuple[float, bool]]] = {}  # noqa: RUF012

    def __init__(self, vllm_config: Any, state: Any, *is_pin_memory: bool) -> None:
        # Of the first runner ``state`` is the device; of the second, its requests' slots.
        self._state = state
        self._entries: dict[int, tuple[dict[str, Any], list[int]]] = {}  # by row
        self._asked: dict[int, dict[str, Any]] = {}  # by slot

    def is_argmax_invariant(self) -> bool:
        """See ``LogitsProcessor``: forcing changes the argmax."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """See ``LogitsProcessor``."""

        def entry(params: Any, prompt: Any, output: list[int]) -> Any:
            asked = (params.extra_args or {}).get(KEY)
            return None if asked is None else (asked, output)

        process_dict_updates(self._entries, batch_update, entry)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """See ``RunnerV2LogitsProcessor``."""
        asked = (sampling_params.extra_args or {}).get(KEY)
        self._asked.pop(req_idx, None)
        if asked is not None:
            self._asked[req_idx] = asked
        return asked is not None

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Writes down or compares, then forces; ``ctx`` is the second runner's."""
        if ctx is None:
            for row, (asked, output) in self._entries.items():
                _force(logits[row], asked, len(output), self.results)
            return logits
        for row, slot in enumerate(ctx.idx_mapping_np):
            if (waiting := self._asked.get(int(slot))) is not None:
                seen = int(ctx.seq_lens_upper_bound_np[row])
                step = seen - int(self._state.prompt_len.np[slot])
                _force(logits[row], waiting, step, self.results)
        return logits


def _force(
    logits: torch.Tensor,
    asked: dict[str, Any],
    step: int,
    results: dict[str, dict[tuple[str, int], tuple[float, bool]]],
) -> None:
    """One request's logits ``[vocabulary]`` at a step, counted from its first new token."""
    tokens = asked["tokens"]
    dense = numpy.load(asked["file"], mmap_mode="r+" if tokens is None else "r")
    if not 0 <= step < len(dense):
        return  # a chunk of a prompt, or an engine that runs a step ahead of a request's end
    logprobs = logits.float().log_softmax(-1)
    if tokens is None:
        dense[step] = logprobs.cpu().numpy()
        return
    reference = torch.tensor(dense[step], device=logits.device)
    kl = float((reference.exp() * (reference - logprobs)).sum())
    agrees = bool(reference.argmax() == logprobs.argmax())
    results.setdefault(asked["name"], {})[asked["file"], step] = kl, agrees
    logits.fill_(-torch.inf)
    logits[tokens[step]] = 0.0
