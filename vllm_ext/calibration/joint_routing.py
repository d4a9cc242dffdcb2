"""Trains the routers of nested groups together, on what every depth was measured to cost.

Prompts are dense, so what a route costs is known for every depth before any training: the expected
divergence of soft gates is a sum over the depths, and no pass of the model and no estimate of a
gradient through hard gates is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

STEPS = 200
STEP_SIZE = 0.05
PRICE_STEP = 0.5  # of the multiplier's logarithm, by share too many
FIRST_PRICE = 0.02  # nats for all layers full
PRICES = (1e-4, 10.0)


@dataclass(frozen=True)
class Depths:
    """What is known beforehand.

    Attributes:
        kl: ``[prompts, depths]``.
        shares: ``[depths]``, of full layers; ascending.
        share: the mean that is aimed at.
    """

    kl: np.ndarray
    shares: np.ndarray
    share: float


@torch.enable_grad()
def fit_depths(
    features: np.ndarray, measured: Depths, kept: np.ndarray, l2: float
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises KL + multiplier * (share - target), the multiplier rising while too much is full.

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
    inputs = torch.from_numpy((features - mean) / scale)
    costs, parts = torch.from_numpy(measured.kl), torch.from_numpy(measured.shares)
    counted = torch.from_numpy(kept / kept.sum(1, keepdims=True))
    num_groups = len(parts) - 1
    weights = inputs.new_zeros(len(kept), inputs.shape[1], num_groups).requires_grad_()
    bias = inputs.new_zeros(len(kept), 1, num_groups).requires_grad_()
    optimizer = torch.optim.Adam([weights, bias], lr=STEP_SIZE)
    price = inputs.new_full((len(kept),), FIRST_PRICE)
    for _ in range(STEPS):
        chance = _depth_chances(inputs @ weights + bias)
        full = ((chance @ parts) * counted).sum(1)
        lost = ((chance * costs).sum(2) * counted).sum(1)
        decay = l2 * weights.square().sum((1, 2)) / len(inputs)
        optimizer.zero_grad()
        torch.autograd.backward((lost + price * full + decay).sum())
        optimizer.step()
        price = (price * (PRICE_STEP * (full.detach() - measured.share)).exp()).clamp(*PRICES)
    found = weights.detach().numpy() / scale[:, None]
    return found, bias.detach().numpy()[:, 0] - mean @ found


def _depth_chances(scores: torch.Tensor) -> torch.Tensor:
    """``[..., depths]`` of ``scores [..., groups]``."""
    reached = torch.sigmoid(scores).cumprod(-1)
    reached = torch.nn.functional.pad(reached, (1, 0), value=1.0)
    return reached - torch.nn.functional.pad(reached[..., 1:], (0, 1))
