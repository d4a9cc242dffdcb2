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

KEY = "vllm_ext_eval"  # in a request's extra_args
CLASS_PATH = f"{__name__}:ForcingProcessor"


class ForcingProcessor(LogitsProcessor):
    """Per request ``{KEY: {"file": path, "tokens": null | [ids]}}``.

    Without tokens: a request decodes freely, its log-probabilities are written to the file
    at the end. With tokens: they are forced, and ``[kl, agrees]`` per step is collected in
    ``results`` under the request's ``"name"``, by file and step: vLLM samples after every chunk of
    a prompt, and what stands there in the end is of the last one.
    """

    # read by the worker process
    results: dict[str, dict[tuple[str, int], tuple[float, bool]]] = {}  # noqa: RUF012

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._entries: dict[int, tuple[dict[str, Any], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """See ``LogitsProcessor``: forcing changes the argmax."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """See ``LogitsProcessor``."""

        def entry(params: Any, prompt: Any, output: list[int]) -> Any:
            asked = (params.extra_args or {}).get(KEY)
            return None if asked is None else (asked, output)

        process_dict_updates(self._entries, batch_update, entry)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Writes down or compares, then forces."""
        for row, (asked, output) in self._entries.items():
            logprobs = logits[row].float().log_softmax(-1)
            step, tokens = len(output), asked["tokens"]
            dense = numpy.load(asked["file"], mmap_mode="r+" if tokens is None else "r")
            if step >= len(dense):
                continue  # the engine may run a step ahead of a request's end
            if tokens is None:
                dense[step] = logprobs.cpu().numpy()
                continue
            reference = torch.tensor(dense[step], device=logits.device)
            kl = float((reference.exp() * (reference - logprobs)).sum())
            agrees = bool(reference.argmax() == logprobs.argmax())
            self.results.setdefault(asked["name"], {})[asked["file"], step] = kl, agrees
            logits[row] = -torch.inf
            logits[row, tokens[step]] = 0.0
        return logits
