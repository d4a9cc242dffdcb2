"""Which replica the prefix router chooses, with three of them; Ray's own choice is given."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: scripts/setup.sh ray")

from ray.exceptions import RayActorError

from deploy.ray.balance import Assignments
from deploy.ray.router import PrefixCacheAffinityRouter, PrefixRouter

PROMPT = list(range(20))


@dataclass(frozen=True)
class _Id:
    """As much of Ray's ReplicaID as is used."""

    name: str

    def to_full_id_str(self) -> str:
        return self.name


def _replica(name: str) -> Any:
    return SimpleNamespace(replica_id=_Id(name))


A, B, C = map(_replica, "abc")


class _Request:
    """As much of Ray's PendingRequest as is used."""

    def __init__(self, number: int, prompt: list[int]) -> None:
        self.metadata = SimpleNamespace(internal_request_id=str(number), multiplexed_model_id="")
        self.future = SimpleNamespace(cancelled=lambda: False)
        self.args = [SimpleNamespace(prompt=prompt)]


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replica A knows PROMPT; Ray finds the load unbalanced and chooses B or C."""

    async def match(text: str, tenants: list[str]) -> tuple[str, list[str]]:
        known = " ".join(map(str, PROMPT))
        return (known, ["a"]) if text.startswith(known) else ("", tenants)

    async def choice_of_ray(*_: Any) -> list[list[Any]]:
        return [[B, C]]

    monkeypatch.setattr(PrefixCacheAffinityRouter, "choose_replicas", choice_of_ray)
    made: Any = object.__new__(PrefixRouter)
    made._assignments = Assignments()
    made._match_rate_threshold, made._imbalanced_threshold = 0.1, 2
    made._tree_actor = SimpleNamespace(prefix_match=SimpleNamespace(remote=match))
    made._replicas = {each.replica_id: each for each in (A, B, C)}
    made._replica_queue_len_cache = {}
    made._use_replica_queue_len_cache = True
    return made


def _ranks(router: Any, request: Any) -> list[set[str]]:
    ranks = asyncio.run(router.choose_replicas([A, B, C], request))
    return [{replica.replica_id.name for replica in rank} for rank in ranks]


def test_who_knows_the_prompt_gets_it_however_busy_a_third_is(router: Any) -> None:
    router._replica_queue_len_cache = {A.replica_id: 2, B.replica_id: 1, C.replica_id: 20}
    assert _ranks(router, _Request(1, PROMPT)) == [{"a"}, {"b", "c"}]


def test_but_not_with_more_than_the_threshold_in_flight(router: Any) -> None:
    router._replica_queue_len_cache = {A.replica_id: 4, B.replica_id: 1, C.replica_id: 20}
    assert _ranks(router, _Request(1, PROMPT)) == [{"b"}, {"a", "c"}]


def test_prompts_that_nobody_knows_are_spread(router: Any) -> None:
    requests = [_Request(number, [100 + number] * 20) for number in range(6)]
    chosen = [_ranks(router, request)[0] for request in requests]
    assert sorted(min(rank) for rank in chosen) == ["a", "a", "b", "b", "c", "c"]


def test_without_the_prefix_tree_requests_go_where_the_fewest_are(
    router: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(*_: Any) -> Any:
        raise RayActorError

    router._tree_actor.prefix_match.remote = lost
    router._replica_queue_len_cache = {A.replica_id: 2, B.replica_id: 3, C.replica_id: 1}
    assert _ranks(router, _Request(1, PROMPT)) == [{"c"}, {"a", "b"}]
    monkeypatch.setattr(PrefixCacheAffinityRouter, "choose_replicas", lost)
    router._replica_queue_len_cache[C.replica_id] = 9
    assert _ranks(router, _Request(2, PROMPT)) == [{"a"}, {"b", "c"}]
