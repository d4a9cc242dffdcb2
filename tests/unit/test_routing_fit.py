"""Orders, routers and thresholds against plain readings of their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.flux_offline.routing_report import combined_policy
from vllm_ext.calibration.routing_fit import (
    fit_logistic,
    fit_router,
    greedy_order,
    nested_depths,
    oracle_depths,
    prefix_masks,
    threshold_for,
)
from vllm_ext.calibration.routing_outcomes import Variants


@pytest.mark.parametrize("num_features", [3, 60])
def test_the_regression_is_at_its_minimum(num_features: int) -> None:
    chance = np.random.default_rng(0)
    features = chance.normal(size=(40, num_features)) * 5 + 3
    is_needed = features[:, 0] + chance.normal(size=40) > 3
    router = fit_logistic(features, is_needed, 2.0)
    scale = features.std(0)

    def loss(weights: np.ndarray, bias: float) -> float:
        logits = (features - features.mean(0)) @ weights + bias
        likelihood = np.logaddexp(0, np.where(is_needed, -logits, logits)).sum()
        return float(likelihood + ((weights * scale) ** 2).sum() + 5e-4 * bias**2)

    least = loss(router.weights, router.bias)
    for _ in range(50):
        change = chance.normal(size=num_features) * 0.01 / scale
        assert least < loss(router.weights + change, router.bias + 0.01 * chance.normal())


def test_routers_find_what_matters_and_folds_are_held_out() -> None:
    chance = np.random.default_rng(1)
    features = chance.normal(size=(200, 5))
    router, logits = fit_router(features, features[:, 2] > 0, 0)
    assert np.abs(router.weights).argmax() == 2
    assert ((logits > 0) == (features[:, 2] > 0)).mean() > 0.9
    noise, held = fit_router(features, chance.random(200) > 0.5, 0)
    assert noise.l2 >= 10
    assert np.abs(held).max() < 1


def test_orders_put_what_helps_most_first() -> None:
    worth = np.array([1.0, 5.0, 0.5, 3.0])

    def damage(masks: np.ndarray) -> np.ndarray:
        return np.asarray(((~masks) * worth).sum(1))

    for is_forward in (True, False):
        assert greedy_order(damage, 4, is_forward) == [1, 3, 0, 2]
    assert prefix_masks([1, 3, 0, 2])[2].tolist() == [False, True, False, True]


def test_depths_and_thresholds_keep_to_the_share() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [3.0, -1.0, 5.0], [-2.0, 4.0, 4.0]])
    assert nested_depths(scores, 0.0).tolist() == [3, 1, 0]
    shares = np.array([0.2, 0.4, 0.6, 0.8])

    def share_of(threshold: float) -> float:
        return float(shares[nested_depths(scores, threshold)].mean())

    threshold = threshold_for(share_of, scores, 0.4)
    assert share_of(threshold) <= 0.4
    assert share_of(threshold - 1e-6) > 0.4 or threshold == scores.min()
    kl = np.array([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.0]])
    assert oracle_depths(kl, shares, 0.3).tolist() == [1, 0]


def test_groups_apart_are_looked_up_by_their_bits() -> None:
    masks = np.array([[number >> place & 1 for place in range(3)] for number in range(8)], bool)
    table = np.tile(np.arange(8.0), (2, 1))
    variants = Variants(masks, table, table, table)
    scores = np.array([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    outcome = combined_policy(variants, scores)(0.5)
    assert outcome.kl.tolist() == [5.0, 2.0]
    assert outcome.share.tolist() == pytest.approx([2 / 3, 1 / 3])


def test_a_share_between_two_variants_is_a_mixture_of_both() -> None:
    masks = np.zeros((2, 3, 4), bool)  # each prompt has full layers of its own
    masks[0, 1, :2] = masks[1, 1, 3:] = masks[:, 2] = True
    figures = np.array([[4.0, 2.0, 0.0], [1.0, 1.0, 1.0]])
    mixed = Variants(masks, figures, figures, figures).between(0.375 + 0.25 * 0.625)
    assert mixed.share.tolist() == pytest.approx([0.625, 0.4375])
    assert mixed.share.mean() == pytest.approx(0.53125)
    assert mixed.kl.tolist() == pytest.approx([1.5, 1.0])
