"""Which KV head gets which span: the least influence under a density budget, in classes of heads
that an engine can group without padding.

A mixed-integer program, solved by HiGHS through scipy. MoA (arXiv 2406.14909, section 4.2) solves
one with a commercial solver, at most two rules per layer. We differ: rules are classes across
layers, at most eight, since each is a KV group of its own; and a class has a whole number of
groups, one class exactly one (``attn_backends.head_classes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from attn_backends.head_classes import group_sizes
from kvcache.spans import Span
from vllm_ext.errors import UserError

TIME_LIMIT_S = 60.0
GAP = 0.01  # relative, at which a solution is good enough


@dataclass(frozen=True)
class Program:
    """What is to be solved.

    Attributes:
        costs: ``[heads, rules]``, 0 or more: what it costs to give a head a rule.
        densities: ``[lengths, rules]``: share of the tokens that a rule keeps.
        density: the most of it, on average over the heads, at every length; where every rule
            keeps more, the least that any keeps and a tenth.
        group: heads of a group.
    """

    costs: np.ndarray
    densities: np.ndarray
    density: float
    group: int


def density_of(span: Span, num_tokens: int) -> float:
    """Share of its tokens that a request of this length keeps, its last query being the next."""
    return min(1.0, (span.sink_tokens + span.tokens(num_tokens)) / num_tokens)


def group_size(num_heads: int) -> int:
    """The smallest groups of which a model has not too many."""
    return next(group_sizes(num_heads))


def require_solver() -> None:
    """Asked before anything long is begun.

    Raises:
        UserError: scipy is not installed.
    """
    if find_spec("scipy") is None:
        raise UserError('the solver is not installed; in this folder: pip install ".[profile]"')


def assign(program: Program) -> list[int]:
    """A rule for each head.

    Raises:
        UserError: scipy is not installed, or no assignment keeps to the budget.
    """
    heads, rules = program.costs.shape
    found = _solve(program, is_integral=True)
    chosen: list[int] = found.x[: heads * rules].reshape(heads, rules).argmax(1).tolist()
    return chosen


def least_cost(program: Program) -> float:
    """What an assignment costs at least, if heads may be in as many classes as they like.

    Raises:
        UserError: see ``assign``.
    """
    found = _solve(program, is_integral=False)
    return float((found.x[: program.costs.size] * program.costs.ravel()).sum())


def _solve(program: Program, is_integral: bool) -> Any:
    """scipy's result; variables are x[head, rule], then z[rule, k - 1]: a rule has k groups."""
    require_solver()
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    heads, rules = program.costs.shape
    groups = heads // program.group
    rows, lower, upper = _constraints(program, heads, rules, groups)
    scale = max(float(program.costs.max()), 1e-30)
    found = milp(
        np.concatenate([program.costs.ravel() / scale, np.zeros(rules * groups)]),
        integrality=np.full(rows.shape[1], int(is_integral)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(csr_array(rows), lower, upper),
        options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": GAP},
    )
    if found.x is None:
        raise UserError(
            f"--density is {program.density}; no assignment of spans to KV heads keeps to it "
            f"({found.message}); give more"
        )
    return found


def _constraints(
    program: Program, heads: int, rules: int, groups: int
) -> tuple[np.ndarray, list[float], list[float]]:
    num_x, counts = heads * rules, range(1, groups + 1)
    rows: list[np.ndarray] = []
    lower: list[float] = []
    upper: list[float] = []

    def add(x: np.ndarray | None, z: np.ndarray | None, low: float, high: float) -> None:
        row = np.zeros(num_x + rules * groups)
        if x is not None:
            row[:num_x] = x.ravel()
        if z is not None:
            row[num_x:] = z.ravel()
        rows.append(row)
        lower.append(low)
        upper.append(high)

    for head in range(heads):  # one rule each
        x = np.zeros((heads, rules))
        x[head] = 1
        add(x, None, 1, 1)
    for length in program.densities:
        most = max(program.density, 1.1 * float(length.min()))
        add(np.tile(length, (heads, 1)) / heads, None, 0, most)
    for rule in range(rules):
        x, z, one = np.zeros((heads, rules)), np.zeros((rules, groups)), np.zeros((rules, groups))
        x[:, rule], z[rule], one[rule] = 1, [-program.group * k for k in counts], 1
        add(x, z, 0, 0)
        add(None, one, 0, 1)
    smallest = np.zeros((rules, groups))
    smallest[:, 0] = 1  # a class of one group: else the engine's groups would be larger
    add(None, smallest, 1, rules)
    return np.stack(rows), lower, upper


def mean_density(spans: Sequence[Span], num_tokens: int) -> float:
    """Over heads."""
    return sum(density_of(span, num_tokens) for span in spans) / len(spans)
