"""A router per request against the best layers for all requests, at equal shares of full layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_ext.calibration.routing_fit import nested_depths, threshold_for
from vllm_ext.calibration.routing_outcomes import (
    Outcome,
    Policy,
    Variants,
    by_kind,
    interval_text,
    mean_known,
)


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
    shares = "/".join(f"{value:.2f}" for value in by_kind(outcome.share, kinds))
    kls = "/".join(f"{value:.4f}" for value in by_kind(outcome.kl, kinds))
    cells = (
        name,
        f"{outcome.share.mean():.3f} ({shares})",
        f"{outcome.kl.mean():.4f} {interval_text(outcome.kl)}",
        kls,
        f"{plain.kl.mean():.4f}",
        f"{(outcome.kl - plain.kl).mean():+.4f} {interval_text(outcome.kl - plain.kl)}",
        f"{outcome.agreement.mean():.3f} ({plain.agreement.mean():.3f})",
        f"{mean_known(outcome.hits):.3f} ({mean_known(plain.hits):.3f})",
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
        kls = "/".join(f"{value:.4f}" for value in by_kind(one.kl, kinds))
        rows.append(
            f"| {count} | {one.kl.mean():.4f} {interval_text(one.kl)} | {kls} "
            f"| {one.agreement.mean():.3f} | {mean_known(one.hits):.3f} |"
        )
    return "\n".join(rows)
