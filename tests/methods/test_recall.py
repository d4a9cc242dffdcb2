"""Recall against its definition, and the guard against a plain reading of its rule."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from attn_backends.batch import BlockSelection, RowOptions
from attn_backends.recall import (
    BOUNDS,
    RecallWatch,
    inherited_recall,
    own_recall,
    served_recall,
)


def _selection(blocks: list[list[list[int]]]) -> BlockSelection:
    logical = torch.tensor(blocks, dtype=torch.int32)
    return BlockSelection(logical, (logical >= 0).sum(2).int())


MASS = torch.tensor([[[0.5, 0.3, 0.2, 0.0], [0.0, 0.25, 0.25, 1.5]]])  # one row, two heads


def test_own_recall_is_the_mean_covered_share() -> None:
    chosen = _selection([[[0, 1, -1], [3, -1, -1]]])
    assert own_recall(MASS, chosen).tolist() == pytest.approx([(0.8 + 0.75) / 2])
    everything = _selection([[[0, 1, 2, 3], [0, 1, 2, 3]]])
    assert own_recall(MASS, everything).tolist() == [1.0]


def test_inherited_recall_takes_the_best_head_before() -> None:
    crossed = _selection([[[3, -1, -1], [0, 1, -1]]])
    assert own_recall(MASS, crossed).tolist() == pytest.approx([(0.0 + 0.125) / 2])
    assert inherited_recall(MASS, crossed).tolist() == pytest.approx([(0.8 + 0.75) / 2])


def test_served_recall_is_that_of_the_worst_head_against_its_own_choice() -> None:
    given = _selection([[[0, 2], [1, 2]]])
    best = _selection([[[0, 1], [2, 3]]])
    assert served_recall(MASS, given, best).tolist() == pytest.approx([0.5 / 1.75])
    assert served_recall(MASS, best, best).tolist() == [1.0]


def _watch(floor: float, patience: int = 2, interval_steps: int = 1) -> RecallWatch:
    return RecallWatch(floor, patience, interval_steps, 4, torch.device("cpu"))


def _step(watch: RecallWatch, recalls: dict[str, float]) -> Sequence[int]:
    """One step in which every row is narrowed and has these recalls of all kinds.

    Returns:
        The rows that were checked.
    """
    ids = list(recalls)
    watch.begin_step(ids)
    checked = watch.expect(ids, range(len(ids)))
    watch.recall[: len(ids)] = torch.tensor(list(recalls.values()))[:, None]
    return checked


def test_the_guard_raises_then_serves_dense_and_follows_the_request() -> None:
    watch = _watch(0.8)
    for _ in range(2):
        _step(watch, {"low": 0.5, "fine": 0.9})
    _step(watch, {"fine": 0.9, "low": 0.5})  # rows moved
    assert watch.guarded(["fine", "low"], {}) == {1: RowOptions(budget_factor=2.0, is_guarded=True)}
    _step(watch, {"low": 0.5})
    _step(watch, {"low": 0.5})
    assert watch.guarded(["low"], {}) == {0: RowOptions(is_dense=True, is_guarded=True)}
    assert watch.actions == {"raised": 1, "dense": 1}
    watch.forget(["low"])
    assert watch.guarded(["low"], {}) == {}


def test_patience_counts_checks_in_a_row() -> None:
    watch = _watch(0.8)
    for recall in (0.5, 0.9, 0.5, 0.9, 0.5):
        _step(watch, {"a": recall})
    watch.begin_step(["a"])
    assert watch.guarded(["a"], {}) == {}


def test_checks_come_at_first_then_in_intervals_and_again_after_a_low_one() -> None:
    watch = _watch(0.8, patience=2, interval_steps=6)
    recalls = [0.9] * 6 + [0.5] + [0.9] * 6
    checked = [step for step, recall in enumerate(recalls) if _step(watch, {"a": recall})]
    assert checked == [0, 1, 2, 3, 6, 7, 12]
    # A neighbour changes nothing.
    together = _watch(0.8, patience=2, interval_steps=6)
    rows = [_step(together, {"b": 0.9, "a": recall}) for recall in recalls]
    assert [step for step, due in enumerate(rows) if 1 in due] == checked


def test_a_raised_budget_starts_from_what_the_request_asked_for() -> None:
    watch = _watch(0.8, patience=1)
    _step(watch, {"a": 0.1})
    watch.begin_step(["a"])
    asked = {0: RowOptions(budget_tokens=256)}
    assert watch.guarded(["a"], asked) == {0: RowOptions(budget_tokens=512, is_guarded=True)}


def test_without_a_floor_recall_is_only_watched() -> None:
    watch = _watch(0.0, patience=1)
    for recall in (0.1, 0.96, 0.96):
        assert _step(watch, {"a": recall}) == []
    assert watch.guarded(["a"], {}) == {}
    assert watch.sums["own"] == pytest.approx(1.06)
    assert watch.sums["served"] == 0
    counts = dict(zip(BOUNDS, watch.histograms["own"], strict=False))
    assert (counts[0.5], counts[0.975]) == (1, 1)
    assert 0.1 < watch.ema["own"] < 0.96


def test_rows_that_are_not_sparse_or_not_known_do_not_count() -> None:
    watch = _watch(0.8, patience=1)
    watch.begin_step(["dense", "sparse"])
    assert watch.expect(["dense", "sparse"], [1]) == [1]
    watch.recall[0] = 0.0
    watch.recall[1] = 0.9
    watch.begin_step([])
    assert sum(watch.histograms["own"]) == 1
    assert watch.guarded(["dense", "sparse"], {}) == {}
    assert watch.expect([], [0, 1]) == []  # a worker that does not tell ids (GPU)


def test_rows_that_read_a_kept_selection_do_not_count_as_covered() -> None:
    watch = _watch(0.8, interval_steps=64)
    watch.begin_step(["kept", "selects"])
    assert watch.expect(["kept", "selects"], [0, 1], choosing_rows=[1]) == [0, 1]
    watch.recall[1] = 0.9
    watch.begin_step([])
    assert watch.sums == {"own": pytest.approx(0.9), "inherited": pytest.approx(0.9)} | {
        "served": pytest.approx(1.9)  # a check is of what is read, kept or not
    }
