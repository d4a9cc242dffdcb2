"""What policies of full layers do to prompts, and its figures in tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vllm_ext.calibration.routed_prompts import KINDS
from vllm_ext.calibration.routing_fit import interval

NEEDED_KL = 0.05  # nats


@dataclass(frozen=True)
class Outcome:
    """What a policy did to each prompt, ``[prompts]`` each.

    Attributes:
        share: of layers that were full.
        kl: mean of the answer's tokens.
        agreement: share of the tokens whose likeliest is dense's.
        hits: share of the keys in the greedy answer; NaN where none is asked for.
    """

    share: np.ndarray
    kl: np.ndarray
    agreement: np.ndarray
    hits: np.ndarray


Policy = Callable[[float], Outcome]  # of the mean share of full layers


@dataclass(frozen=True)
class Variants:
    """All prompts under the same masks, ``[prompts, variants]`` each, ``masks [variants, layers]``
    or ``[prompts, variants, layers]``.
    """

    masks: np.ndarray
    kl: np.ndarray
    agreement: np.ndarray
    hits: np.ndarray

    def pick(self, columns: np.ndarray) -> Outcome:
        """One variant for each prompt, ``[prompts]``."""
        rows = np.arange(len(columns))
        masks = self.masks[columns] if self.masks.ndim == 2 else self.masks[rows, columns]
        figures = (one[rows, columns] for one in (self.kl, self.agreement, self.hits))
        return Outcome(masks.mean(1), *figures)

    def between(self, share: float) -> Outcome:
        """Of variants in the order of their shares: a mixture of two with this mean share."""
        shares = self.masks.mean(-1).reshape(-1, self.kl.shape[1]).mean(0)
        above = min(max(int(np.searchsorted(shares, share)), 1), len(shares) - 1)
        step = max(float(shares[above] - shares[above - 1]), 1e-9)
        part = min(max(float(share - shares[above - 1]) / step, 0.0), 1.0)
        columns = np.full(len(self.kl), above)
        low, high = self.pick(columns - 1), self.pick(columns)
        return Outcome(*((1 - part) * getattr(low, n) + part * getattr(high, n) for n in vars(low)))

    def part(self, columns: slice | np.ndarray) -> Variants:
        """Some of the variants."""
        return Variants(
            self.masks[..., columns, :],
            self.kl[:, columns],
            self.agreement[:, columns],
            self.hits[:, columns],
        )


def mean_counted(figures: np.ndarray, is_counted: np.ndarray) -> np.ndarray:
    """``[prompts, variants]``: mean over an answer's tokens that count."""
    weights = is_counted / is_counted.sum(1, keepdims=True)
    known = np.nan_to_num(figures.astype(np.float64))
    return np.asarray(np.einsum("pvt,pt->pv", known, weights))


def auc(scores: np.ndarray, is_needed: np.ndarray) -> float:
    """Chance that one that is needed scores above one that is not; NaN without both."""
    above = scores[is_needed][:, None] - scores[~is_needed][None]
    return float(((above > 0) + 0.5 * (above == 0)).mean()) if above.size else float("nan")


def is_needed(variants: Variants, column: int, whole: int) -> np.ndarray:
    """Bool ``[prompts]``: this variant is far from dense, or loses a key that dense finds.

    Args:
        variants: measured.
        column: of the variant.
        whole: the column of dense.
    """
    lost = variants.hits[:, column] < variants.hits[:, whole]
    return np.asarray((variants.kl[:, column] > NEEDED_KL) | lost)


def by_kind(values: np.ndarray, kinds: np.ndarray) -> list[float]:
    """Means of what is known, in the order of ``KINDS``."""
    return [mean_known(values[kinds == kind]) for kind in range(len(KINDS))]


def interval_text(values: np.ndarray) -> str:
    """The mean's 95% interval, for a table."""
    low, high = interval(values)
    return f"[{low:.4f}, {high:.4f}]"


def mean_known(values: np.ndarray) -> float:
    """NaN where nothing is known."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
