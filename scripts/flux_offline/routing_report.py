"""A router per request against the best layers for all requests, at equal shares of full layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from scripts.flux_offline.routed_prompts import KINDS
from scripts.flux_offline.routing_fit import interval, nested_depths, threshold_for


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
        """Of variants with 0, 1, ... full layers: a mixture of two with this mean share."""
        num_layers = self.masks.shape[-1]
        below = min(int(share * num_layers + 1e-9), num_layers - 1)
        part = share * num_layers - below
        columns = np.full(len(self.kl), below)
        low, high = self.pick(columns), self.pick(columns + 1)
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


def nested_policy(nested: Variants, logits: np.ndarray) -> Policy:
    """Groups are full up to the first that its router does not need.

    Args:
        nested: of 0, 1, ... full groups.
        logits: ``[prompts, groups]``.
    """
    shares = nested.masks.mean(1)

    def policy(share: float) -> Outcome:
        threshold = threshold_for(
            lambda threshold: float(shares[nested_depths(logits, threshold)].mean()), logits, share
        )
        return nested.pick(nested_depths(logits, threshold))

    return policy


def combined_policy(combined: Variants, scores: np.ndarray) -> Policy:
    """Each group by itself.

    Args:
        combined: of full groups in binary order, the first the lowest bit.
        scores: ``[prompts, groups]``.
    """
    shares = combined.masks.mean(1)

    def columns(threshold: float) -> np.ndarray:
        return np.asarray((scores > threshold) @ (1 << np.arange(scores.shape[1])))

    def policy(share: float) -> Outcome:
        threshold = threshold_for(
            lambda threshold: float(shares[columns(threshold)].mean()), scores, share
        )
        return combined.pick(columns(threshold))

    return policy


HEADER = (
    "| policy | full layers (retr/text/instr) | KL [95%] | KL retr/text/instr "
    "| static KL at that share | policy - static [95%] | top-1 (static) | needles (static) |\n"
    "|---|---|---|---|---|---|---|---|"
)


def line(name: str, outcome: Outcome, static: Variants, kinds: np.ndarray) -> str:
    """A row of the table.

    Args:
        name: of the policy.
        outcome: its own.
        static: ``between`` gives the best static allocation.
        kinds: ``[prompts]``, indices of ``KINDS``.
    """
    plain = static.between(float(outcome.share.mean()))
    shares = "/".join(f"{value:.2f}" for value in _by_kind(outcome.share, kinds))
    kls = "/".join(f"{value:.4f}" for value in _by_kind(outcome.kl, kinds))
    cells = (
        name,
        f"{outcome.share.mean():.3f} ({shares})",
        f"{outcome.kl.mean():.4f} {_interval(outcome.kl)}",
        kls,
        f"{plain.kl.mean():.4f}",
        f"{(outcome.kl - plain.kl).mean():+.4f} {_interval(outcome.kl - plain.kl)}",
        f"{outcome.agreement.mean():.3f} ({plain.agreement.mean():.3f})",
        f"{_mean(outcome.hits):.3f} ({_mean(plain.hits):.3f})",
    )
    return "| " + " | ".join(cells) + " |"


def static_lines(static: Variants, kinds: np.ndarray, counts: Sequence[int]) -> str:
    """The static allocation's curve.

    Args:
        static: 0, 1, ... full layers.
        kinds: as for ``line``.
        counts: of full layers, a row each.
    """
    rows = ["| full layers | KL | KL retr/text/instr | top-1 | needles |", "|---|---|---|---|---|"]
    for count in counts:
        one = static.pick(np.full(len(kinds), count))
        kls = "/".join(f"{value:.4f}" for value in _by_kind(one.kl, kinds))
        rows.append(
            f"| {count} | {one.kl.mean():.4f} {_interval(one.kl)} | {kls} "
            f"| {one.agreement.mean():.3f} | {_mean(one.hits):.3f} |"
        )
    return "\n".join(rows)


def auc(scores: np.ndarray, is_needed: np.ndarray) -> float:
    """Chance that one that is needed scores above one that is not; NaN without both."""
    above = scores[is_needed][:, None] - scores[~is_needed][None]
    return float(((above > 0) + 0.5 * (above == 0)).mean()) if above.size else float("nan")


def _by_kind(values: np.ndarray, kinds: np.ndarray) -> list[float]:
    return [_mean(values[kinds == kind]) for kind in range(len(KINDS))]


def _interval(values: np.ndarray) -> str:
    low, high = interval(values)
    return f"[{low:.4f}, {high:.4f}]"


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
