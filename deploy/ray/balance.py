"""What a router has in flight, and which replica that leaves the least loaded; without Ray."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Replica = TypeVar("Replica")


class Assignments:
    """Which replica each request in flight was given, from the choice to its last token.

    A request that was chosen for and then given up (its client left) is forgotten with its object:
    Ray has no hook for that.
    """

    def __init__(self) -> None:
        self._replicas: dict[str, Any] = {}
        self._undelivered: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._delivered: set[str] = set()

    def choose(self, request: Any, replica_id: Any) -> None:
        """Count `request` (a PendingRequest) for `replica_id`; the latest choice holds."""
        request_id = request.metadata.internal_request_id
        self._replicas[request_id] = replica_id
        self._undelivered[request_id] = request

    def deliver(self, request: Any, replica_id: Any) -> None:
        """`replica_id` took it: it counts until `complete`, whatever becomes of its object."""
        request_id = request.metadata.internal_request_id
        if request_id in self._replicas:
            self._replicas[request_id] = replica_id
            self._delivered.add(request_id)

    def complete(self, request_id: str, replica_id: Any) -> None:
        """`replica_id` is done with it, in whatever way; one that refused it may say so only
        when it has been given to another, with which it still counts.
        """
        if self._replicas.get(request_id) == replica_id:
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        del self._replicas[request_id]
        self._delivered.discard(request_id)

    def loads(self) -> Counter[Any]:
        """Requests in flight by replica id."""
        for request_id in self._replicas.keys() - self._delivered:
            request = self._undelivered.get(request_id)
            if request is None or request.future.cancelled():
                self._forget(request_id)
        return Counter(self._replicas.values())


def least_loaded(
    preferred: Sequence[Replica],
    others: Sequence[Replica],
    load: Callable[[Replica], int],
    slack: float,
) -> Replica:
    """The least loaded of `preferred`, unless one of `others` has over `slack` requests less.

    Args:
        load: requests in flight of one of them.
    """
    best = min(preferred, key=load)
    idlest = min([best, *others], key=load)
    return idlest if load(best) - load(idlest) > slack else best
