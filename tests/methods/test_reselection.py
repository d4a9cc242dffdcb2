"""Which rows select anew, and where the selections of the others lie."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from attn_backends.reselection import SelectionKeeper

CPU = torch.device("cpu")
LAYER = 7


def _keeper(reselect_steps: int = 4, max_num_reqs: int = 4) -> SelectionKeeper:
    def budget_of(seq_len: int) -> int:
        return 512 if seq_len <= 110 else 1024

    return SelectionKeeper(reselect_steps, budget_of, (LAYER,), (max_num_reqs, 2, 8), CPU)


def _step(
    keeper: SelectionKeeper, ids: list[str], lengths: list[int], keys: list[Hashable]
) -> tuple[list[int], list[int]]:
    """Rows that choose anew, and the slot of each."""
    step = keeper.begin_step(ids, lengths, keys)
    kept = step.by_anchor[LAYER]
    assert (kept.due.tolist() if kept.due is not None else []) == step.due_rows
    return step.due_rows, kept.slots.tolist()


def _due_lengths(keeper: SelectionKeeper, lengths: range) -> list[int]:
    """At which lengths a request that runs alone chooses."""
    return [length for length in lengths if _step(keeper, ["a"], [length], ["key"])[0]]


def test_rows_select_at_their_first_step_and_where_blocks_begin() -> None:
    # Position = length - 1: the first token of a block of four selects.
    assert _due_lengths(_keeper(), range(10, 23)) == [10, 13, 17, 21]
    assert _due_lengths(_keeper(), range(13, 18)) == [13, 17]


def test_neighbours_change_nothing() -> None:
    alone, together = _keeper(), _keeper()
    expected = _due_lengths(alone, range(10, 23))
    got = []
    for step, length in enumerate(range(10, 23)):
        # The neighbour comes and goes, and the row moves.
        ids, lengths = (["b", "a"], [3 * step + 1, length]) if step % 3 else (["a"], [length])
        due, _ = _step(together, ids, lengths, ["key"] * len(ids))
        if ids.index("a") in due:
            got.append(length)
    assert got == expected


def test_another_budget_or_a_gap_selects_at_once() -> None:
    keeper = _keeper(32)
    assert _step(keeper, ["a"], [100], ["wide"])[0] == [0]
    assert _step(keeper, ["a"], [101], ["wide"])[0] == []
    assert _step(keeper, ["a"], [102], ["narrow"])[0] == [0]
    # A policy gives longer rows another budget.
    assert _due_lengths(_keeper(32), range(105, 125)) == [105, 111]
    # Dense steps select nothing; what lies before the last block's begin is too old.
    assert _step(keeper, ["a"], [160], ["narrow"])[0] == [0]
    # Recomputed from an earlier token on: what was selected later does not count.
    assert _step(keeper, ["a"], [130], ["narrow"])[0] == [0]


def test_a_preempted_request_keeps_its_slot_until_it_is_needed() -> None:
    keeper = _keeper(32, max_num_reqs=2)
    _, (first, second) = _step(keeper, ["a", "b"], [100, 100], [None, None])
    assert {first, second} == {0, 1}
    assert _step(keeper, ["b"], [101], [None]) == ([], [second])
    assert _step(keeper, ["a", "b"], [101, 102], [None, None]) == ([], [first, second])
    assert _step(keeper, ["c", "b"], [50, 103], [None, None]) == ([0], [first, second])
    assert _step(keeper, ["a", "b"], [102, 104], [None, None]) == ([0], [first, second])


def test_ended_requests_free_their_slots() -> None:
    keeper = _keeper(32, max_num_reqs=1)
    for step in range(3):
        name = f"request {step}"
        assert _step(keeper, [name], [100], [None]) == ([0], [0])
        keeper.forget([name, "never seen"])
    assert _step(keeper, ["request 0"], [101], [None])[0] == [0], "its selection is gone"
