"""Prefix-affinity routing that survives prompts without text and bursts of prompts.

Ray's router divides by the length of a prompt's text; of token ids and of empty prompts it sees
none, and such a request then waits for ever (ray-project/ray#64573, open in 2.60).

It also learns where a request went only once a replica has taken it: of prompts that arrive
together each sees the same queues and the same prefix tree, and all go to one replica.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.llm.request_router import PrefixCacheAffinityRouter

from deploy.ray.balance import Assignments, least_loaded

logger = logging.getLogger("ray.serve")


@contextmanager
def surviving_the_tree() -> Iterator[None]:
    """What Ray does with its prefix tree, an actor that may be lost with its node.

    Ray would raise, log it, and leave the request waiting for ever.
    """
    try:
        yield
    except RayActorError as error:
        _tell_of_the_loss(str(error))


@cache  # every request meets it
def _tell_of_the_loss(error: str) -> None:
    logger.error(
        "the prefix tree is lost (%s): requests go where the fewest are, whoever has their "
        "prefix cached, until the ingress replicas start anew",
        error,
    )


def prefix_text(prompt: Any) -> str | None:
    """What the prefix tree compares of a prompt of token ids; None for other prompts.

    Args:
        prompt: a completion request's; of several prompts the first decides.
    """
    ids = prompt[0] if isinstance(prompt, list) and prompt else None
    ids = ids if isinstance(ids, list) else prompt
    if isinstance(ids, list) and ids and isinstance(ids[0], int):
        return " ".join(map(str, ids))
    return None


class PrefixRouter(PrefixCacheAffinityRouter):
    """Ray's router; token ids have prefixes too, and a burst is spread as it arrives.

    A prompt whose beginning a replica knows goes there unless that replica has
    `imbalanced_threshold` more requests in flight than another; any other prompt goes where the
    fewest are. Sizes of prefix trees, Ray's measure for these, only decide between equals.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        super().initialize_state(**kwargs)
        self._assignments = Assignments()

    def _extract_text_from_request(self, pending_request: Any) -> str | None:
        for argument in pending_request.args:
            if text := prefix_text(getattr(argument, "prompt", None)):
                return text
        try:
            return super()._extract_text_from_request(pending_request) or None
        except ValueError:  # neither prompt nor messages, as with prompt embeddings
            return None

    async def _knowing(self, pending_request: Any, replicas: Sequence[Any]) -> list[Any]:
        """Replicas that know the prompt best, if any of them knows enough as Ray judges it.

        Ray's own choice does not say: one busy replica, whichever, makes it a random one.
        """
        text = self._extract_text_from_request(pending_request)
        if text is None:
            return []
        by_id = {replica.replica_id.to_full_id_str(): replica for replica in replicas}
        matched, tenants = await self._tree_actor.prefix_match.remote(text, list(by_id))
        if len(matched) / len(text) < self._match_rate_threshold:
            return []
        return [by_id[tenant] for tenant in tenants or () if tenant in by_id]

    def _load(self, replica: Any, ours: Counter[Any]) -> int:
        """Requests in flight; other ingress replicas' show in Ray's count only, and late."""
        ray_count = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return max(ours[replica.replica_id], ray_count)

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Ray's choice, corrected by who knows the prompt and by what is in flight; the others
        after it, for when it does not answer.
        """
        ranks = [list(candidate_replicas)]
        with surviving_the_tree():
            ranks = await super().choose_replicas(candidate_replicas, pending_request)
        preferred = [replica for rank in ranks for replica in rank]
        # A model that only some replicas have loaded (LoRA) stays where Ray put it.
        if pending_request is None or not preferred or self._is_multiplexed(pending_request):
            return ranks
        knowing: list[Any] = []
        with surviving_the_tree():
            knowing = await self._knowing(pending_request, candidate_replicas)
        slack = self._imbalanced_threshold if knowing else 0
        # No await from here on: of two choices at once the second sees the first.
        ours = self._assignments.loads()
        alive = [r for r in candidate_replicas if r.replica_id in self.curr_replicas]
        best = least_loaded(knowing or preferred, alive, lambda each: self._load(each, ours), slack)
        self._assignments.choose(pending_request, best.replica_id)
        others = [each for each in alive if each.replica_id != best.replica_id]
        return [[best], others] if others else [[best]]

    @staticmethod
    def _is_multiplexed(pending_request: Any) -> bool:
        return bool(pending_request.metadata.multiplexed_model_id)

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        self._assignments.deliver(pending_request, replica_id)
        with surviving_the_tree():
            super().on_request_routed(pending_request, replica_id, result)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        self._assignments.complete(internal_request_id, replica_id)
        super().on_request_completed(replica_id, internal_request_id)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        with surviving_the_tree():
            super().on_replica_actor_died(replica_id)

    def update_replicas(self, replicas: list[Any]) -> None:
        with surviving_the_tree():
            super().update_replicas(replicas)
