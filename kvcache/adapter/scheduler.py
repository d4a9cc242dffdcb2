"""vLLM's schedulers with routes: what a worker decided about a request reaches the KV managers.

Managers free by it in the request's next ``allocate_slots``. Under async scheduling the step that
is under way then was planned after the decision, and so reads nothing of the gap.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from kvcache.adapter.managers import RoutedManager
from kvcache.adapter.news import routes_of


class RoutingScheduler:
    """Put before a scheduler of vLLM in the bases."""

    requests: Any
    finished_req_ids: set[str]
    kv_cache_manager: Any

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """See ``Scheduler.schedule``; of requests that ended, managers forget the routes."""
        for manager in self._routed_managers():
            for request_id in self.finished_req_ids:
                manager.forget_route(request_id)
        stock: Any = super()
        return stock.schedule(*args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """See ``Scheduler.update_from_output``; news of requests that ended meanwhile are void."""
        for request_id, route in routes_of(model_runner_output).items():
            if request_id in self.requests:
                for manager in self._routed_managers():
                    manager.learn_route(request_id, route)
        stock: Any = super()
        return stock.update_from_output(scheduler_output, model_runner_output)

    def _routed_managers(self) -> list[RoutedManager]:
        managers = self.kv_cache_manager.coordinator.single_type_managers
        return [manager for manager in managers if isinstance(manager, RoutedManager)]


class RoutingSyncScheduler(RoutingScheduler, Scheduler):
    """Where a step's output is known before the next one is scheduled."""


class RoutingAsyncScheduler(RoutingScheduler, AsyncScheduler):
    """Where it is not."""
