"""Routers of FLUX: which groups of layers a request needs in full, from what its prompt's last
queries look at.

Groups are nested: one is full only where all groups before it are, so a request has a *depth*, the
number of its full groups. Routers are linear in the attention mass that each KV head puts into the
gap, and in the logarithm of the prompt's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_ext.calibration.joint_routing import Depths, fit_depths
from vllm_ext.calibration.layer_splits import Split, splits
from vllm_ext.calibration.routed_prompts import KINDS
from vllm_ext.calibration.routing_fit import (
    FOLDS,
    fit_router,
    nested_depths,
    threshold_for,
)
from vllm_ext.calibration.routing_outcomes import Outcome, Variants, is_needed

RETRIEVAL = KINDS.index("retrieval")
JOINT_L2 = (0.01, 0.03, 0.1)
FINALISTS = 5  # splits that are trained at every strength
LEAST_TAKEN = 0.05  # of the prompts, at every depth
FEW_WITNESSES = (4, 8)  # layers whose evidence may do instead of all layers'
# Nats beyond which an answer is another one; how far beyond is chance, and would rule the fit.
FAR_KL = 0.1
# What divergence costs where a key is asked for, as a multiple: the answer is right or wrong there.
# With 1, routers narrowed prompts of 7,680 tokens whose keys are then lost, 8 of 82.
RETRIEVAL_WEIGHT = 5.0


@dataclass(frozen=True)
class Measured:
    """Prompts under nested routes.

    Attributes:
        kinds: ``[prompts]``, indices of ``KINDS``.
        num_tokens: ``[prompts]``.
        gap: ``[prompts, layers, num_kv_heads]``, mass in the gap, mean of the last queries.
        numbers: of full layers, ascending; the last is all.
        variants: a column for each of ``numbers``: that many of the first layers of the order.
    """

    kinds: np.ndarray
    num_tokens: np.ndarray
    gap: np.ndarray
    numbers: tuple[int, ...]
    variants: Variants

    def features(self) -> np.ndarray:
        """``[prompts, layers * num_kv_heads + 1]``, as ``Router`` reads them."""
        return np.asarray(np.c_[self.gap.reshape(len(self.gap), -1), np.log(self.num_tokens)])

    def nested(self, numbers: Sequence[int]) -> Variants:
        """Some of the numbers of full layers."""
        return self.variants.part(np.array([self.numbers.index(number) for number in numbers]))

    def costs(self, numbers: Sequence[int]) -> np.ndarray:
        """``[prompts, numbers]``: see ``costs_of``."""
        nested = self.nested(numbers)
        return self._costs(nested.kl, nested.hits)

    def costs_of(self, outcome: Outcome) -> np.ndarray:
        """``[prompts]``, in nats up to twice ``FAR_KL``: an answer that loses the keys that dense
        finds is worse by that much. ``RETRIEVAL_WEIGHT`` times as much where keys are asked for.
        """
        return self._costs(outcome.kl[:, None], outcome.hits[:, None])[:, 0]

    def _costs(self, kl: np.ndarray, hits: np.ndarray) -> np.ndarray:
        lost = np.nan_to_num(self.variants.hits[:, -1:] - hits).clip(0)
        weight = np.where(self.kinds == RETRIEVAL, RETRIEVAL_WEIGHT, 1.0)
        return np.asarray((np.minimum(kl, FAR_KL) + FAR_KL * lost) * weight[:, None])


@dataclass(frozen=True)
class Router:
    """A group is full where its score, and that of all before it, is above zero.

    Attributes:
        weights: ``[groups, layers, num_kv_heads]``, on the mass in the gap.
        log_tokens: ``[groups]``, on the logarithm of the prompt's tokens.
        bias: ``[groups]``.
    """

    weights: np.ndarray
    log_tokens: np.ndarray
    bias: np.ndarray

    @property
    def witnesses(self) -> list[int]:
        """Layers whose evidence has a weight."""
        found: list[int] = np.flatnonzero((self.weights != 0).any((0, 2))).tolist()
        return found

    def depths(self, prompts: Measured) -> np.ndarray:
        """``[prompts]``."""
        mass = np.einsum("plh,glh->pg", prompts.gap, self.weights)
        scores = mass + np.log(prompts.num_tokens)[:, None] * self.log_tokens + self.bias
        return nested_depths(scores, 0.0)


@dataclass(frozen=True)
class Fit:
    """A split's routers.

    Attributes:
        split: the parts.
        kind: ``logistic`` or ``joint``.
        coefficients: ``[features, groups]``.
        bias: ``[groups]``, with the threshold of the share taken off.
        folds: what the prompts get from routers that did not see them.
        loss: mean cost of the folds.
        least_taken: share of these prompts at the depth that fewest take.
    """

    split: Split
    kind: str
    coefficients: np.ndarray
    bias: np.ndarray
    folds: Outcome
    loss: float
    least_taken: float

    @property
    def rank(self) -> tuple[bool, float]:
        """What chooses among fits, the least first: a depth that nobody takes is a KV group for
        nothing.
        """
        return self.least_taken < LEAST_TAKEN, self.loss

    def router(self, num_layers: int) -> Router:
        """The same in the shape of a file."""
        weights = self.coefficients[:-1].T.reshape(len(self.bias), num_layers, -1)
        return Router(weights, self.coefficients[-1], self.bias)


class RouterFits:
    """Fits the routers of any split, on the same prompts.

    Args:
        prompts: that are fitted.
        share: of full layers, mean over the prompts, at most.
        seed: of the folds.
    """

    def __init__(self, prompts: Measured, share: float, seed: int) -> None:
        self._prompts, self._share, self._seed = prompts, share, seed
        self._features = prompts.features()
        chance = np.random.default_rng(seed)
        self._fold = chance.permutation(len(self._features)) % FOLDS
        self._groups: dict[int, tuple[np.ndarray, float, np.ndarray]] = {}

    def best(self) -> list[Fit]:
        """Of each kind the fit that is best in the folds, over all splits; the best kind first.
        Empty where there is no split.
        """
        known = list(splits(self._prompts.gap.shape[1], self._share))
        if not known:
            return []
        joint = [self.joint(split, JOINT_L2[1:2]) for split in known]
        finalists = sorted(joint, key=lambda fit: fit.rank)[:FINALISTS]
        best = min((self.joint(fit.split) for fit in finalists), key=lambda fit: fit.rank)
        fewer = [self._with_witnesses(best, number) for number in FEW_WITNESSES]
        fits = [
            min((self.logistic(split) for split in known), key=lambda fit: fit.rank),
            min((*fewer, best), key=lambda fit: fit.rank),
        ]
        return sorted(fits, key=lambda fit: fit.rank)

    def logistic(self, split: Split) -> Fit:
        """A regression for each group: is its request far from dense without it?"""
        found = [self._group(number) for number in split.numbers()[:-1]]
        coefficients, biases, logits = zip(*found, strict=True)
        return self._fit(
            split,
            "logistic",
            np.stack(coefficients, 1),
            np.array(biases),
            np.stack(logits, 1),
        )

    def joint(
        self,
        split: Split,
        strengths: Sequence[float] = JOINT_L2,
        features: np.ndarray | None = None,
    ) -> Fit:
        """All groups at once, by the divergence that is left at a share (``fit_depths``).

        Args:
            split: the parts.
            strengths: of L2; the one that is best in the folds is taken.
            features: instead of all; zeros get no weight.
        """
        features = self._features if features is None else features
        costs = self._prompts.costs(split.numbers())
        shares = np.array(split.numbers()) / self._prompts.gap.shape[1]
        measured = Depths(costs, shares, self._share)
        held = self._fold == np.arange(FOLDS)[:, None]
        kept = np.concatenate([~held, np.ones_like(held[:1])])
        fits = []
        for l2 in strengths:
            weights, bias = fit_depths(features, measured, kept, l2)
            scores = features @ weights[:-1] + bias[:-1, None]
            # Of each prompt the scores by the fit that did not see it.
            unseen = scores[self._fold, np.arange(len(costs))]
            fits.append(self._fit(split, "joint", weights[-1], bias[-1], unseen))
        return min(fits, key=lambda fit: fit.rank)

    def _with_witnesses(self, fit: Fit, number: int) -> Fit:
        """The same split on the evidence of the layers that weigh most: an engine then collects
        it in few layers. What weighs most is chosen on all prompts, which flatters the folds a
        little.
        """
        num_prompts, num_layers, num_heads = self._prompts.gap.shape
        weight = np.abs(fit.coefficients[:-1]).sum(1) * self._features[:, :-1].std(0)
        order = weight.reshape(num_layers, num_heads).sum(1).argsort()[::-1]
        features = self._features.copy()
        gap = features[:, :-1].reshape(num_prompts, num_layers, num_heads)
        gap[:, order[number:]] = 0
        features[:, :-1] = gap.reshape(num_prompts, -1)
        return self.joint(fit.split, features=features)

    def _group(self, number: int) -> tuple[np.ndarray, float, np.ndarray]:
        """Coefficients, bias and the folds' logits of whether ``number`` layers are too few."""
        if number not in self._groups:
            numbers = self._prompts.numbers
            column = numbers.index(number)
            needed = is_needed(self._prompts.variants, column, len(numbers) - 1)
            router, logits = fit_router(self._features, needed, self._seed)
            bias = float(router.bias - router.mean @ router.weights)
            self._groups[number] = router.weights, bias, logits
        return self._groups[number]

    def _fit(
        self, split: Split, kind: str, weights: np.ndarray, bias: np.ndarray, scores: np.ndarray
    ) -> Fit:
        """With the threshold that gives the share on the folds' scores."""
        nested = self._prompts.nested(split.numbers())
        shares = nested.masks.mean(1)
        threshold = threshold_for(
            lambda threshold: float(shares[nested_depths(scores, threshold)].mean()),
            scores,
            self._share,
        )
        depths = nested_depths(scores, threshold)
        costs = self._prompts.costs(split.numbers())[np.arange(len(depths)), depths]
        taken = np.bincount(depths, minlength=len(shares)) / len(depths)
        folds, loss = nested.pick(depths), float(costs.mean())
        return Fit(split, kind, weights, bias - threshold, folds, loss, float(taken.min()))
