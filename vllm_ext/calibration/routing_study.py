"""Prompts whose answers are measured under many routes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_ext.calibration.routed import Evidence, RoutedModel
from vllm_ext.calibration.routed_attention import Prompted
from vllm_ext.calibration.routed_prompts import KINDS, RoutedPrompt

STACKED_TOKENS = {"cuda": 1 << 16, "cpu": 1 << 12}  # of prompts that are computed as one
MOST_STACKED = 16
RETRIEVAL_TOKENS = 16  # of an answer that count: what follows the key is no retrieval


@dataclass(frozen=True)
class Batch:
    """Neighbours among a study's prompts.

    Attributes:
        rows: which.
        prompted: their keys and values.
        answers: ``[prompts, 1 + tokens]`` of the dense model.
    """

    rows: slice
    prompted: Prompted
    answers: torch.Tensor


class Study:
    """Prompts, computed once, with the dense model's answers.

    Args:
        model: the model.
        tokenizer: its own.
        prompts: any order.
        answer_tokens: of each answer, after the first.

    Attributes:
        prompts: shortest first; whatever is measured has this order.
        evidence: of each.
        answers: ``[prompts, 1 + answer_tokens]``.
        is_counted: bool ``[prompts, answer_tokens]``: which tokens of the answers count.
    """

    def __init__(
        self,
        model: RoutedModel,
        tokenizer: Any,
        prompts: Sequence[RoutedPrompt],
        answer_tokens: int,
    ) -> None:
        self.prompts = sorted(prompts, key=lambda prompt: len(prompt.ids))
        self.evidence: list[Evidence] = []
        self._model, self._tokenizer = model, tokenizer
        self._batches = [
            self._batch(rows, answer_tokens) for rows in stacks(self.prompts, model.device.type)
        ]
        self.answers = torch.cat([batch.answers for batch in self._batches]).cpu().numpy()
        is_over = np.cumsum(self.answers == tokenizer.eos_token_id, 1)[:, :-1] > 0
        self.is_counted = ~is_over
        self.is_counted[self.of_kind("retrieval"), RETRIEVAL_TOKENS - 1 :] = False
        self.is_counted[:, 0] = True

    def of_kind(self, kind: str) -> np.ndarray:
        """Bool ``[prompts]``."""
        return np.array([prompt.kind == kind for prompt in self.prompts])

    def compare(
        self, masks: np.ndarray, num_tokens: int | None = None, most_batches: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """``RoutedModel.compare`` of all prompts.

        Args:
            masks: bool ``[variants, layers]`` for all, or ``[prompts, variants, layers]``.
            num_tokens: of the answers, the first ones; None is all.
            most_batches: that are compared, spread over all lengths; None is all.

        Returns:
            ``[prompts, variants, tokens]``, both; no divergence (NaN) where tokens do not count.
        """
        batches = self._batches
        if most_batches is not None and most_batches < len(batches):
            places = np.linspace(0, len(batches) - 1, most_batches).round().astype(int)
            batches = [batches[place] for place in np.unique(places)]
        last = None if num_tokens is None else 1 + num_tokens
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in batches:
            routes = self._routes(masks, batch.rows)
            kl, agrees = self._model.compare(batch.prompted, batch.answers[:, :last], routes)
            is_counted = self.is_counted[batch.rows, None, :num_tokens]
            found.append((np.where(is_counted, kl.numpy(), np.nan), agrees.numpy()))
        kls, agreements = zip(*found, strict=True)
        return np.concatenate(kls), np.concatenate(agreements)

    def hits(self, masks: np.ndarray) -> np.ndarray:
        """``[prompts, variants]``: share of the keys that a greedy answer has; NaN where none is
        asked for. Masks as for ``compare``.
        """
        found = np.full((len(self.prompts), masks.shape[-2]), np.nan, dtype=np.float32)
        for batch in self._batches:
            rows = [row for row in range(*batch.rows.indices(1 << 30)) if self.prompts[row].answers]
            if not rows:
                continue
            places = torch.tensor(rows, device=self._model.device) - batch.rows.start
            routes = self._routes(masks, batch.rows)[places.cpu()]
            given = self._model.respond(batch.prompted.chosen(places), routes, RETRIEVAL_TOKENS - 1)
            texts = self._tokenizer.batch_decode(given.flatten(0, 1).cpu())
            for number, row in enumerate(rows):
                said = texts[number * masks.shape[-2] :][: masks.shape[-2]]
                keys = self.prompts[row].answers
                found[row] = [sum(key in text for key in keys) / len(keys) for text in said]
        return found

    def raw(self) -> dict[str, np.ndarray]:
        """What is known of the prompts, for a file."""
        evidence = {
            name: np.stack([getattr(one, name).numpy() for one in self.evidence]).astype(np.float16)
            for name in ("gap_mean", "gap_max", "gap_last", "pooled_query")
        }
        return evidence | {
            "kind": np.array([KINDS.index(prompt.kind) for prompt in self.prompts], np.int8),
            "nominal_tokens": np.array([prompt.length_tokens for prompt in self.prompts]),
            "prompt_tokens": np.array([len(prompt.ids) for prompt in self.prompts]),
            "answers": self.answers.astype(np.int32),
            "is_counted": self.is_counted,
        }

    def _batch(self, rows: slice, answer_tokens: int) -> Batch:
        parts = []
        for prompt in self.prompts[rows]:
            prompted, evidence = self._model.prefill(prompt.ids)
            parts.append(prompted)
            self.evidence.append(evidence)
        stacked = Prompted.stacked(parts)
        dense = torch.ones(len(parts), 1, self._model.num_layers, dtype=torch.bool)
        return Batch(rows, stacked, self._model.respond(stacked, dense, answer_tokens)[:, 0])

    def _routes(self, masks: np.ndarray, rows: slice) -> torch.Tensor:
        if masks.ndim == 3:
            return torch.from_numpy(masks[rows])
        return torch.from_numpy(masks).expand(rows.stop - rows.start, -1, -1)


def stacks(prompts: Sequence[RoutedPrompt], device: str) -> list[slice]:
    """Neighbours that are computed as one.

    Args:
        prompts: shortest first.
        device: type of the model's.
    """
    budget = STACKED_TOKENS[device]
    found, first = [], 0
    for number, prompt in enumerate(prompts):
        if number - first == MOST_STACKED or (number + 1 - first) * len(prompt.ids) > budget:
            found.append(slice(first, number))
            first = number
    return [one for one in (*found, slice(first, len(prompts))) if one.start < one.stop]
