"""KV entries cover a model, and the engine's groups are the planned ones; or it says why not."""

from __future__ import annotations

import pytest

from kvcache.entries import KVEntry, check_entries
from kvcache.grouping import check_groups
from kvcache.retention import KeepAll, RetentionPolicy, SpanRetention
from kvcache.spans import Span

ALL, WINDOW = KeepAll(), SpanRetention(Span(64, 512))


def test_layers_heads_and_pairs_of_heads_cover_a_model() -> None:
    check_entries([KVEntry(layer, None, ALL) for layer in (1, 0)], 2, 4)
    check_entries([KVEntry(0, (head,), ALL) for head in range(4)], 1, 4)
    check_entries([KVEntry(0, (0, 3), ALL), KVEntry(0, (2, 1), WINDOW)], 1, 4)
    check_entries([KVEntry(0, None, ALL), KVEntry(1, (0, 1, 2, 3), WINDOW)], 2, 4)
    check_entries([KVEntry(1, None, ALL)], 3, 4, dropped_layers={0, 2})


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([KVEntry(0, None, ALL)], r"no entry has KV head 0 of layer 1 \(2 heads"),
        ([KVEntry(0, None, ALL), KVEntry(1, (0,), ALL)], "no entry has KV head 1 of layer 1"),
        ([KVEntry(0, None, ALL), KVEntry(1, (0, 2), ALL)], "entry 1 has KV head 2 of layer 1"),
        ([KVEntry(0, None, ALL), KVEntry(2, None, ALL)], "entry 1 has KV head 0 of layer 2"),
        (
            [KVEntry(0, None, ALL), KVEntry(1, None, ALL), KVEntry(0, (1,), WINDOW)],
            "entries 0 and 2 both have KV head 1 of layer 0",
        ),
        ([KVEntry(0, (0, 0), ALL)], "entries 0 and 0 both have"),
        (
            [KVEntry(0, None, ALL), KVEntry(1, (0,), ALL), KVEntry(1, (1,), WINDOW)],
            r"\(2 in entry 0, 1 in entry 1\)",
        ),
    ],
)
def test_what_does_not_cover_a_model_is_named(entries: list[KVEntry], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_entries(entries, 2, 2)


def test_a_dropped_layer_has_no_entry() -> None:
    with pytest.raises(ValueError, match="layer 1, which the model does not have or which is drop"):
        check_entries([KVEntry(0, None, ALL), KVEntry(1, None, ALL)], 2, 2, dropped_layers={1})


PLAN = {"layer.0.head0": ALL, "layer.0.head1": WINDOW, "layer.1.head1": WINDOW}


def test_groups_as_planned_may_split_a_policy_and_take_up_what_nobody_planned() -> None:
    groups: list[dict[str, RetentionPolicy | None]] = [
        {"layer.0.head0": ALL, "a layer that shares": ALL},
        {"layer.0.head1": WINDOW},
        {"layer.1.head1": WINDOW},
        {},
    ]
    check_groups(PLAN, groups)


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        (
            [{"layer.0.head0": ALL, "layer.0.head1": ALL}, {"layer.1.head1": WINDOW}],
            "entry layer.0.head1 was to keep sink64-window512, and is in KV group 0, which keeps "
            "all; .*install the version",
        ),
        (
            [{"layer.0.head0": ALL, "layer.0.head1": WINDOW}, {"layer.1.head1": WINDOW}],
            "KV group 0 has entry layer.0.head0, which keeps all, and entry layer.0.head1",
        ),
        (
            [{"layer.0.head0": ALL}, {"layer.0.head1": WINDOW}],
            r"entry layer.1.head1 \(keeps sink64-window512\) is in no KV group",
        ),
        (
            [{"layer.0.head0": ALL}, PLAN.fromkeys(list(PLAN)[1:], WINDOW), {"layer.0.head0": ALL}],
            r"entry layer.0.head0 \(keeps all\) is in the KV groups \[0, 2\]",
        ),
        (
            [{"layer.0.head0": None}, PLAN.fromkeys(list(PLAN)[1:], WINDOW)],
            "is in KV group 0, which keeps what vLLM decides",
        ),
    ],
)
def test_other_groups_are_refused_by_name(
    groups: list[dict[str, RetentionPolicy | None]], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        check_groups(PLAN, groups)
