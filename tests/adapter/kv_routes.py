"""What a worker decides about requests of a ``World``, and how its scheduler learns of it."""

from __future__ import annotations

import pickle
from collections import deque
from random import Random
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.outputs import ModelRunnerOutput

from kvcache.adapter.news import with_routes
from kvcache.adapter.scheduler import RoutingScheduler


class _Stock:
    """Nothing of vLLM's scheduler."""

    def schedule(self) -> None:
        """See ``Scheduler.schedule``."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> None:
        """See ``Scheduler.update_from_output``."""


class Routes(RoutingScheduler, _Stock):
    """Routes of random depth, decided when a prompt's last token is scheduled and told later:
    before or after a preemption, an abort or the request's end, now and then twice.
    """

    def __init__(self, manager: KVCacheManager, num_groups: int, source: Random) -> None:
        self.kv_cache_manager = manager
        self.requests: dict[str, Any] = {}
        self.finished_req_ids: set[str] = set()
        self.decided: dict[str, int] = {}  # what the worker reads by
        self._num_groups, self._source = num_groups, source
        self._outputs: deque[Any] = deque()  # of steps that have not ended

    def arrive(self, request: Any) -> None:
        """A request."""
        self.requests[request.request_id] = request

    def decide(self, request_id: str) -> None:
        """A prompt's end is computed; again by a resumed request."""
        if self._num_groups and request_id not in self.decided:
            self.decided[request_id] = (1 << self._source.randint(0, self._num_groups)) - 1
            self.send(request_id)

    def send(self, request_id: str) -> None:
        """As workers in other processes do."""
        output = with_routes(ModelRunnerOutput([], {}), {request_id: self.decided[request_id]})
        self._outputs.append(pickle.loads(pickle.dumps(output)))

    def begin(self) -> None:
        """Steps end, some of them, and one begins."""
        while self._outputs and self._source.random() < 0.15:
            self.update_from_output(SimpleNamespace(), self._outputs.popleft())
        self.schedule()
        self.finished_req_ids = set()

    def end(self, request_id: str) -> None:
        """The request is gone; what is under way still says things about it."""
        if request_id in self.decided and self._source.random() < 0.3:
            self.send(request_id)
        del self.requests[request_id]
        self.finished_req_ids.add(request_id)
        self.decided.pop(request_id, None)

    def is_whole(self, request_id: str, group: int | None) -> bool:
        """Whether the worker reads everything, in layers of a routed group."""
        if group is None:
            return False
        route = self.decided.get(request_id)
        return route is None or bool(route >> group & 1)

    def known(self) -> set[str]:
        """Requests whose route some manager knows."""
        return {name for manager in self._routed_managers() for name in manager._routes}
