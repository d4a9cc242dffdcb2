"""Trains the routers of nested groups together, on what every depth was measured to cost.

Prompts are dense, so what a route costs is known for every depth before any training: the expected
divergence of soft gates is a sum over the depths, and no pass of the model and no estimate of a
gradient through hard gates is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STEPS = 200
STEP_SIZE = 0.05
PRICE_STEP = 0.5  # of the multiplier's logarithm, by share too many
FIRST_PRICE = 0.02  # nats for all layers full
PRICES = (1e-4, 10.0)
DECAYS = (0.9, 0.999)  # of Adam's moments


@dataclass(frozen=True)
class Depths:
    """What is known beforehand.

    Attributes:
        costs: ``[prompts, depths]``, in nats.
        shares: ``[depths]``, of full layers; ascending.
        share: the mean that is aimed at.
    """

    costs: np.ndarray
    shares: np.ndarray
    share: float


def fit_depths(
    features: np.ndarray, measured: Depths, kept: np.ndarray, l2: float
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises cost + multiplier * (share - target), the multiplier rising above the target.

    Args:
        features: ``[prompts, features]``.
        measured: what each depth does to the same prompts.
        kept: bool ``[fits, prompts]``, which prompts each of several fits sees.
        l2: strength on the weights of standardised features, as of one prompt among all.

    Returns:
        Weights ``[fits, features, groups]`` and bias ``[fits, groups]``; there is a group less
        than depths.
    """
    mean, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    inputs = np.c_[(features - mean) / scale, np.ones(len(features))]
    decay = np.r_[np.full(features.shape[1], 2 * l2 / len(features)), 0.0][:, None]
    counted = (kept / kept.sum(1, keepdims=True))[..., None]
    # What a group more changes.
    saved, added = np.diff(measured.costs), np.diff(measured.shares)
    weights = np.zeros((len(kept), inputs.shape[1], len(added)))
    price, descent = np.full(len(kept), FIRST_PRICE), _Descent()
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-(inputs @ weights)))
        reached = chance.cumprod(2) * counted
        # A group's score moves its own depth and all behind it.
        paid = reached * (saved + price[:, None, None] * added)
        behind = paid[..., ::-1].cumsum(2)[..., ::-1]
        slope = inputs.T @ (behind * (1 - chance)) + decay * weights
        weights = weights - descent.step(slope)
        share = measured.shares[0] + reached.sum(1) @ added
        price = np.clip(price * np.exp(PRICE_STEP * (share - measured.share)), *PRICES)
    found = weights[:, :-1] / scale[:, None]
    return found, weights[:, -1] - mean @ found


class _Descent:
    """Adam's steps."""

    def __init__(self) -> None:
        self._first: np.ndarray | float = 0.0
        self._second: np.ndarray | float = 0.0
        self._number = 0

    def step(self, slope: np.ndarray) -> np.ndarray:
        """What to go down along this slope."""
        self._number += 1
        self._first = DECAYS[0] * self._first + (1 - DECAYS[0]) * slope
        self._second = DECAYS[1] * self._second + (1 - DECAYS[1]) * slope**2
        first = self._first / (1 - DECAYS[0] ** self._number)
        second = self._second / (1 - DECAYS[1] ** self._number)
        return np.asarray(STEP_SIZE * first / (np.sqrt(second) + 1e-8))
