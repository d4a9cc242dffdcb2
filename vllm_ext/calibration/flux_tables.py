"""Tables of prompts: what each was, what its last queries looked at, and what routes do to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from vllm_ext.calibration.routed import RoutedModel
from vllm_ext.calibration.routed_prompts import KINDS, RoutedPrompt
from vllm_ext.calibration.routers import Measured
from vllm_ext.calibration.routing_outcomes import Variants, mean_counted
from vllm_ext.calibration.routing_study import Study, stacks

FIGURES = ("kind", "num_tokens", "gap", "gap_last", "kl", "agreement", "hits")
DIGITS = 7


@dataclass(frozen=True)
class Table:
    """Prompts and variants.

    Attributes:
        kinds: ``[prompts]``, indices of ``KINDS``.
        num_tokens: ``[prompts]``.
        gap: ``[prompts, layers, num_kv_heads]``, mass in the gap, mean of the last queries.
        gap_last: ``[prompts, layers]``, of the last query, mean of the heads.
        variants: what routes do to the prompts.
    """

    kinds: np.ndarray
    num_tokens: np.ndarray
    gap: np.ndarray
    gap_last: np.ndarray
    variants: Variants

    @classmethod
    def joined(
        cls, parts: Iterable[Mapping[str, Any]], masks: np.ndarray, bars: np.ndarray | None
    ) -> Self:
        """Of parts that ``TableMaker`` measured, with the same masks and bars."""
        found = {name: np.concatenate([part[name] for part in parts]) for name in FIGURES}
        variants = Variants(
            with_lazy(masks, found["gap_last"], bars),
            found["kl"],
            found["agreement"],
            found["hits"].astype(float),
        )
        return cls(found["kind"], found["num_tokens"], found["gap"], found["gap_last"], variants)

    def measured(self, numbers: Sequence[int]) -> Measured:
        """The first variants, which are nested routes of these numbers of full layers."""
        nested = self.variants.part(slice(0, len(numbers)))
        shared = Variants(nested.masks[0], nested.kl, nested.agreement, nested.hits)
        return Measured(self.kinds, self.num_tokens, self.gap, tuple(numbers), shared)


class TableMaker:
    """Measures prompts in stacks, whose keys and values are gone afterwards.

    Args:
        model: gives the model, when it is needed.
        tokenizer: its own.
        answer_tokens: of each answer, after the first.
        device: of the model.
    """

    def __init__(
        self, model: Callable[[], RoutedModel], tokenizer: Any, answer_tokens: int, device: str
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._answer_tokens, self._device = answer_tokens, device

    def next_stack(self, prompts: Sequence[RoutedPrompt]) -> Sequence[RoutedPrompt]:
        """The first ones, shortest first, that are measured at once."""
        return prompts[stacks(prompts, self._device)[0]]

    def measure(
        self, prompts: Sequence[RoutedPrompt], masks: np.ndarray, bars: np.ndarray | None
    ) -> dict[str, Any]:
        """``FIGURES`` of one stack, as JSON takes them.

        Args:
            prompts: a stack.
            masks: bool ``[variants, layers]``.
            bars: lazy tests are further variants: layers are full whose last query puts more mass
                than that into the gap, mean of the heads.
        """
        model = self._model()
        study = Study(model, self._tokenizer, prompts, self._answer_tokens)
        gap_last = np.stack([one.gap_last.numpy().mean(1) for one in study.evidence])
        gap_last = gap_last.astype(np.float64).round(DIGITS)  # as a later run reads it
        gaps = np.stack([one.gap_mean.numpy() for one in study.evidence])
        gap = gaps.reshape(*gaps.shape[:2], model.num_kv_heads, -1).mean(-1)
        given = with_lazy(masks, gap_last, bars)
        kl, agrees = study.compare(given)
        hits = study.hits(given)
        return {
            "kind": [KINDS.index(prompt.kind) for prompt in study.prompts],
            "num_tokens": [len(prompt.ids) for prompt in study.prompts],
            "gap": _plain(gap),
            "gap_last": _plain(gap_last),
            "kl": _plain(mean_counted(kl, study.is_counted)),
            "agreement": _plain(mean_counted(agrees, study.is_counted)),
            # JSON knows no NaN.
            "hits": [[None if np.isnan(hit) else float(hit) for hit in row] for row in hits],
        }


def with_lazy(masks: np.ndarray, gap_last: np.ndarray, bars: np.ndarray | None) -> np.ndarray:
    """Bool ``[prompts, variants, layers]``: masks for all prompts, and behind them lazy tests."""
    given = np.repeat(masks[None], len(gap_last), 0)
    return given if bars is None else np.concatenate([given, gap_last[:, None] > bars[:, None]], 1)


def _plain(figures: np.ndarray) -> Any:
    return figures.astype(np.float64).round(DIGITS).tolist()
