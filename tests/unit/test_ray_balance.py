"""Balancing of replicas in front of Ray's prefix router."""

import gc
from types import SimpleNamespace
from typing import Any

from deploy.ray.balance import Assignments, least_loaded


class _Request:
    """As much of Ray's PendingRequest as is used."""

    def __init__(self, request_id: str, is_cancelled: bool = False) -> None:
        self.metadata = SimpleNamespace(internal_request_id=request_id)
        self.future = SimpleNamespace(cancelled=lambda: is_cancelled)


def test_a_burst_is_spread_before_any_of_it_is_delivered() -> None:
    assignments = Assignments()
    burst = [_Request(str(number)) for number in range(5)]
    for request in burst:
        loads = assignments.loads()
        # Ray's choice for prompts that match nothing is the same for all of them.
        replica = least_loaded(["a"], ["a", "b"], lambda name, at=loads: at[name], slack=0)
        assignments.choose(request, replica)
    assert assignments.loads() == {"a": 3, "b": 2}


def test_a_known_prefix_stays_within_the_threshold() -> None:
    loads = {"a": 3, "b": 2, "c": 0}
    for slack, expected in ((0, "c"), (2, "c"), (3, "a"), (float("inf"), "a")):
        assert least_loaded(["a"], list("abc"), loads.__getitem__, slack) == expected
    assert least_loaded(["a", "b"], list("abc"), loads.__getitem__, 2) == "b"
    assert least_loaded(["a"], [], loads.__getitem__, 0) == "a"


def test_requests_count_until_they_end() -> None:
    assignments = Assignments()
    request: Any = _Request("1")
    assignments.choose(request, "a")
    assignments.choose(request, "b")  # refused by a, chosen anew
    assignments.deliver(request, "c")  # b did not answer
    assignments.complete("1", "a")  # told late
    del request
    gc.collect()
    assert assignments.loads() == {"c": 1}
    assignments.complete("1", "c")
    assignments.complete("1", "c")
    assert not assignments.loads()
    assignments.deliver(_Request("1"), "c")  # told late
    assert not assignments.loads()


def test_requests_given_up_before_delivery_are_forgotten() -> None:
    assignments = Assignments()
    cancelled = _Request("cancelled", is_cancelled=True)
    assignments.choose(cancelled, "a")
    assignments.choose(_Request("its client left"), "a")
    gc.collect()
    kept = _Request("kept")
    assignments.choose(kept, "b")
    assert assignments.loads() == {"b": 1}
