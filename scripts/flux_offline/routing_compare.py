"""Routers and their rivals, from what a study measured: fitted on some prompts, held to others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from scripts.flux_offline.routing_report import (
    HEADER,
    combined_policy,
    line,
    nested_policy,
    static_lines,
)
from vllm_ext.calibration.routed_prompts import KINDS
from vllm_ext.calibration.routing_fit import (
    fit_router,
    nested_depths,
    oracle_depths,
    threshold_for,
)
from vllm_ext.calibration.routing_outcomes import (
    Outcome,
    Policy,
    Variants,
    auc,
    is_needed,
    mean_counted,
)

SHARES = (0.3, 0.4, 0.5)
MOST_PLAIN_SHARE = 0.5  # of full layers, for requests that need no retrieval


class Comparison:
    """Of arrays as ``python -m scripts.flux_offline`` writes them.

    Args:
        arrays: by name.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays, self._num_kv_heads = arrays, int(arrays["num_kv_heads"])
        self._layers: int = arrays["masks"].shape[1]
        self._groups: list[list[int]] = arrays["groups"].tolist()
        self._orders = [name for name in ("forward", "backward") if f"columns_{name}" in arrays]
        self._notes: list[str] = []

    def lines(self) -> Iterator[str]:
        """The report, for people."""
        static = self._static()
        kinds = self._arrays["test_kind"]
        rivals = self._rivals()
        yield from self._notes
        yield "\n## Static allocation, held out\n"
        yield static_lines(static, kinds, range(0, self._layers + 1, 2))
        yield "\n## Policies, held out\n"
        yield HEADER
        for share in SHARES:
            for name, policy in rivals.items():
                yield line(f"{name} @{share}", policy(share), static, kinds)
        yield line(*self._tuned, static, kinds)

    def _variants(self, name: str) -> Variants:
        arrays, counted = self._arrays, self._arrays[f"{name}_is_counted"]
        return Variants(
            self._arrays["masks"],
            mean_counted(arrays[f"{name}_kl"], counted),
            mean_counted(arrays[f"{name}_agrees"], counted),
            arrays[f"{name}_hits"],
        )

    def _static(self) -> Variants:
        """At each number of full layers, the order that is best on the prompts that are fitted,
        and what it does to the held-out prompts.
        """
        fit, test = self._variants("fit"), self._variants("test")
        columns = self._columns()
        best = fit.kl.mean(0)[columns].argmin(0)
        chosen = np.take_along_axis(columns, best[None], 0)[0]
        return test.part(chosen)

    def _columns(self) -> np.ndarray:
        """``[orders, layers + 1]``, where 0, 1, ... layers are full."""
        starts = np.array([self._columns_of(order).start for order in self._orders])
        return np.asarray(starts[:, None] + np.arange(self._layers + 1))

    def _columns_of(self, name: str) -> slice:
        first, end = self._arrays[f"columns_{name}"].tolist()
        return slice(first, end)

    def _rivals(self) -> dict[str, Policy]:
        """Policies, each a function of the mean share of full layers."""
        groups = self._groups
        size, test = len(groups[0]), self._variants("test")
        start = self._columns_of("forward").start
        combined = test.part(self._columns_of("combined"))
        rivals: dict[str, Policy] = {}
        for first, name in ((1, ""), (0, ", none always full")):
            nested = test.part(slice(start + first * size, start + (first + 3) * size + 1, size))
            for features in ("gap", "pooled"):
                logits = self._router(features, groups[first : first + 3], first * size)
                rivals[f"router, {features}{name}"] = nested_policy(nested, logits)
                if not first:
                    continue
                rivals[f"router, {features}, groups apart"] = combined_policy(combined, logits)
                if features == "gap":
                    self._tuned = self._tuned_policy(nested, logits)
        gap = self._gap("test", "gap_mean")
        means = np.stack([gap[:, group].mean((1, 2)) for group in groups[1:4]], 1)
        rivals["mean gap mass per group"] = combined_policy(combined, means)
        rivals["lazy test per layer"] = self._lazy_policy()
        nested = test.part(slice(start + size, start + 4 * size + 1, size))
        shares = nested.masks.mean(1)
        rivals["oracle depth"] = lambda share: nested.pick(oracle_depths(nested.kl, shares, share))
        deep = test.part(slice(start, start + self._layers + 1, 1))
        rivals["static, forward order"] = deep.between
        columns = self._columns()
        best = test.kl.mean(0)[columns].argmin(0)
        hindsight = test.part(np.take_along_axis(columns, best[None], 0)[0])
        rivals["static, order of hindsight"] = hindsight.between
        rivals["oracle, any number"] = lambda share: deep.pick(
            oracle_depths(deep.kl, deep.masks.mean(1), share)
        )
        return rivals

    def _router(self, features: str, groups: list[list[int]], always: int) -> np.ndarray:
        """Held-out logits ``[prompts, groups]``; keeps those of the fit, each from a fit that did
        not see its prompt.
        """
        fit, test = self._variants("fit"), self._variants("test")
        held, folds = [], []
        for place, group in enumerate(groups):
            column = self._columns_of("forward").start + always + place * len(group)
            needed = [is_needed(one, column, self._whole()) for one in (fit, test)]
            router, logits = fit_router(self._features("fit", features, group), needed[0], 0)
            held.append(router.logits(self._features("test", features, group)))
            folds.append(logits)
            self._notes.append(
                f"  router on {features}, {always} always full, group {place} {sorted(group)}: "
                f"needed {needed[0].mean():.2f} (held out {needed[1].mean():.2f}), "
                f"L2 {router.l2:g}, AUC {auc(logits, needed[0]):.3f} in folds, "
                f"{auc(held[-1], needed[1]):.3f} held out"
            )
        self._fold_logits = np.stack(folds, 1)
        return np.stack(held, 1)

    def _whole(self) -> int:
        """The column of dense."""
        return int(self._columns_of("forward").start) + self._layers

    def _features(self, name: str, features: str, group: list[int]) -> np.ndarray:
        if features == "gap":
            parts = self._gap(name, "gap_mean")[:, group]
        else:
            parts = self._arrays[f"{name}_pooled_query"][:, group].astype(np.float64)
        length = np.log(self._arrays[f"{name}_prompt_tokens"])
        return np.asarray(np.c_[parts.reshape(len(parts), -1), length])

    def _gap(self, name: str, key: str) -> np.ndarray:
        """``[prompts, layers, num_kv_heads]``."""
        gap = self._arrays[f"{name}_{key}"].astype(np.float64)
        return np.asarray(gap.reshape(*gap.shape[:2], self._num_kv_heads, -1).mean(-1))

    def _tuned_policy(self, nested: Variants, logits: np.ndarray) -> tuple[str, Outcome]:
        """The threshold that prompts of the fit give, where none of them is retrieval."""
        shares = nested.masks.mean(1)
        plain = self._fold_logits[~(self._arrays["fit_kind"] == KINDS.index("retrieval"))]
        threshold = threshold_for(
            lambda threshold: float(shares[nested_depths(plain, threshold)].mean()),
            self._fold_logits,
            MOST_PLAIN_SHARE,
        )
        outcome = nested.pick(nested_depths(logits, threshold))
        return f"router, gap, fit's threshold for {MOST_PLAIN_SHARE} without retrieval", outcome

    def _lazy_policy(self) -> Policy:
        masks, kl, agrees, hits = (
            self._arrays[f"lazy_{name}"] for name in ("masks", "kl", "agrees", "hits")
        )
        counted = self._arrays["test_is_counted"]
        lazy = Variants(masks, mean_counted(kl, counted), mean_counted(agrees, counted), hits)
        return lambda share: lazy.pick(np.full(len(kl), SHARES.index(share)))
