"""Assignments of spans to KV heads: what they cost, and what was found out about them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from vllm_ext.calibration.assignment import Program


@dataclass(frozen=True)
class Plan:
    """A rule for each KV head, layer by layer.

    Attributes:
        aim: how it was found.
        rules: index of each head's rule.
        influence: by length, of what it hides.
        kl_text: divergence from dense on the validation prompts.
        kl_retrieval: likewise.
        agreement_retrieval: share of the response tokens that dense chooses, too.
    """

    aim: str
    rules: list[int]
    influence: list[float]
    kl_text: float = 0.0
    kl_retrieval: float = 0.0
    agreement_retrieval: float = 0.0

    def named(self, name: str) -> str:
        """A name of something that was found out about these rules."""
        return f"{name} {hashlib.sha256(bytes(self.rules)).hexdigest()[:16]}"

    def line(self, title: str) -> str:
        """For people."""
        return (
            f"{title} ({self.aim}): KL text {self.kl_text:.4f}, retrieval "
            f"{self.kl_retrieval:.4f}; top-1 retrieval {self.agreement_retrieval:.1%}"
        )

    @property
    def loss(self) -> float:
        """What the choice minimises: both kinds of prompt count the same."""
        return (self.kl_text + self.kl_retrieval) / 2


def both_kinds(samples: list[dict[str, Any]]) -> np.ndarray:
    """``[heads, rules]``: each kind's mean over its prompts, scaled to a mean of one."""
    parts = []
    for kind in sorted({sample["kind"] for sample in samples}):
        costs = np.mean([sample["costs"] for sample in samples if sample["kind"] == kind], axis=0)
        parts.append(costs / max(float(costs.mean()), 1e-30))
    return np.asarray(np.mean(parts, axis=0))


def never_less(costs: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """``[heads, rules]`` where a rule that keeps less never costs less: few samples say it may.

    Args:
        costs: ``[heads, rules]``.
        kept: ``[rules]``, the share of the tokens that each keeps.
    """
    order = np.argsort(-kept, kind="stable")
    risen = costs.copy()
    risen[:, order] = np.maximum.accumulate(costs[:, order], axis=1)
    return risen


def opened(costs: np.ndarray, gates: Sequence[float], number: int) -> np.ndarray:
    """``[heads, rules]`` under which the heads of the widest gates, and no others, get the last
    rule, which hides nothing.

    Args:
        costs: ``[heads, rules]``.
        gates: of the heads.
        number: of heads.
    """
    bound, much = costs.copy(), 100 * float(costs.max())
    is_open = np.isin(np.arange(len(costs)), np.argsort(gates)[::-1][:number])
    bound[is_open, :-1] += much
    bound[~is_open, -1] += much
    return bound


def halved(rules: list[int], needs: Mapping[int, float], half: int, program: Program) -> list[int]:
    """A plan in which half of the heads that see everything see half of it, the others more.

    Args:
        rules: of the plan that it is made of, by head.
        needs: of everything, by head that sees it: those of the greatest keep it.
        half: the rule that the others get.
        program: whose groups and density it keeps to.

    Returns:
        Every head below half has the next wider rule of the plan, or half, by classes and the
        widest first, as far as the density goes. Empty where less than two groups see everything.
    """
    keeping = len(needs) // 2 // program.group * program.group
    if not keeping:
        return []
    found = list(rules)
    for head in sorted(needs, key=lambda head: -needs[head])[keeping:]:
        found[head] = half
    steps = sorted({half} | {rule for rule in rules if rule < half})
    for narrow, wider in reversed(list(pairwise(steps))):
        raised = [wider if old == narrow else now for old, now in zip(rules, found, strict=True)]
        if program.densities[:, raised].mean(axis=1).max() <= program.density:
            found = raised
    return found


def paid(costs: np.ndarray, rules: list[int]) -> float:
    """What an assignment costs."""
    return round(float(costs[np.arange(len(rules)), rules].sum()), 4)
