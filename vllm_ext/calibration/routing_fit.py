"""Which layers are routed together, and which requests need them: orders, routers, thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

L2_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
FOLDS = 5
MAX_STEPS = 50

Damage = Callable[[np.ndarray], np.ndarray]  # bool [variants, layers] -> [variants], less is better


@dataclass(frozen=True)
class Logistic:
    """A fitted router of one group.

    Attributes:
        mean: ``[features]``, subtracted.
        weights: ``[features]``.
        bias: of the logit.
        l2: the strength that it was fitted with.
    """

    mean: np.ndarray
    weights: np.ndarray
    bias: float
    l2: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """``[prompts]`` of ``features [prompts, features]``; above zero: needed."""
        return np.asarray((features - self.mean) @ self.weights + self.bias)


def fit_logistic(features: np.ndarray, is_needed: np.ndarray, l2: float) -> Logistic:
    """Logistic regression by Newton's method on standardised features.

    Args:
        features: ``[prompts, features]``.
        is_needed: bool ``[prompts]``.
        l2: strength on the standardised weights; the bias is free up to a trifle.
    """
    mean, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    standard = (features - mean) / scale
    # Of more features than prompts, the prompts' span holds the solution.
    basis = np.linalg.svd(standard, full_matrices=False)[2]
    inputs = np.c_[standard @ basis.T, np.ones(len(standard))]
    penalty = np.r_[np.full(len(basis), l2), 1e-3]
    weights = np.zeros(inputs.shape[1])
    for _ in range(MAX_STEPS):
        chance = _sigmoid(inputs @ weights)
        slope = inputs.T @ (chance - is_needed) + penalty * weights
        curve = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + np.diag(penalty)
        step = np.linalg.solve(curve, slope)
        weights -= step * min(1.0, 5.0 / max(float(np.abs(inputs @ step).max()), 1e-30))
        if np.abs(step).max() < 1e-8:
            break
    return Logistic(mean, basis.T @ weights[:-1] / scale, float(weights[-1]), l2)


def fit_router(
    features: np.ndarray, is_needed: np.ndarray, seed: int
) -> tuple[Logistic, np.ndarray]:
    """The regression whose strength predicts held-out folds best.

    Returns:
        The router, and ``[prompts]`` logits, each of a fit that did not see its prompt.
    """
    fold = np.random.default_rng(seed).permutation(len(features)) % FOLDS
    found: list[tuple[float, float, np.ndarray]] = []
    for l2 in L2_STRENGTHS:
        logits = np.empty(len(features))
        for number in range(FOLDS):
            kept, held = fold != number, fold == number
            logits[held] = fit_logistic(features[kept], is_needed[kept], l2).logits(features[held])
        loss = np.logaddexp(0, np.where(is_needed, -logits, logits)).mean()
        found.append((float(loss), l2, logits))
    _, l2, logits = min(found, key=lambda one: one[0])
    return fit_logistic(features, is_needed, l2), logits


def greedy_order(damage: Damage, num_layers: int, is_forward: bool) -> list[int]:
    """Layers, the most needed first.

    Args:
        damage: of masks whose true layers are full.
        num_layers: of the model.
        is_forward: from all layers sparse, the one that helps most turns full; otherwise, from all
            full, the one that hurts least turns sparse.
    """
    chosen: list[int] = []
    while len(chosen) < num_layers:
        left = [layer for layer in range(num_layers) if layer not in chosen]
        masks = np.full((len(left), num_layers), not is_forward)
        masks[:, chosen] = is_forward
        masks[np.arange(len(left)), left] = is_forward
        chosen.append(left[int(np.argmin(damage(masks)))] if len(left) > 1 else left[0])
    return chosen if is_forward else chosen[::-1]


def prefix_masks(order: Sequence[int]) -> np.ndarray:
    """``[layers + 1, layers]``: the first 0, 1, ... layers of an order are full."""
    rank = np.argsort(order)
    return np.asarray(rank[None] < np.arange(len(order) + 1)[:, None])


def nested_depths(scores: np.ndarray, threshold: float) -> np.ndarray:
    """``[prompts]``: how many groups from the first on score above the threshold, ``scores
    [prompts, groups]``.
    """
    return np.asarray((scores > threshold).cumprod(1).sum(1))


def threshold_for(
    share_of: Callable[[float], float], scores: np.ndarray, most_share: float
) -> float:
    """The least threshold whose mean share of full layers is at most ``most_share``.

    Args:
        share_of: threshold to mean share; falls as the threshold rises.
        scores: candidates.
        most_share: 0 to 1.
    """
    candidates = np.unique(scores)
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if share_of(float(candidates[middle])) <= most_share + 1e-9:
            high = middle
        else:
            low = middle + 1
    return float(candidates[low])


def oracle_depths(kl: np.ndarray, shares: np.ndarray, most_share: float) -> np.ndarray:
    """The depths of least total KL at a mean share, known beforehand by nobody.

    Args:
        kl: ``[prompts, depths]``.
        shares: ``[depths]`` of full layers.
        most_share: mean over the prompts.
    """

    def chosen(price: float) -> np.ndarray:
        return np.asarray((kl + price * shares).argmin(1))

    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if shares[chosen(middle)].mean() <= most_share + 1e-9:
            high = middle
        else:
            low = middle
    return chosen(high)


def interval(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """Bootstrap interval, 95%, of the mean over prompts."""
    chosen = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[chosen].mean(1), [2.5, 97.5])
    return float(low), float(high)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)))
