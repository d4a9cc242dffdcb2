"""Routes on their way: a worker's output, a scheduler, managers that free, and who counts them."""

from __future__ import annotations

import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    ModelRunnerOutput,
)

from attn_backends.adapter import planning
from attn_backends.adapter.entries import SplitEngine
from attn_backends.adapter.planning import StepPlanner, shared_planner, take_routes
from attn_backends.adapter.requests import BOOK
from attn_backends.adapter.worker import RetainingWorker
from attn_backends.answer_windows import AnswerWindowSelector
from attn_backends.config import ConfigError
from attn_backends.method import Geometry
from attn_backends.methods import load_method
from attn_backends.plan import LayerRole, LayerSchedule
from attn_backends.routing import Router
from kvcache.adapter.news import ATTRIBUTE, routes_of, with_routes
from kvcache.adapter.scheduler import RoutingAsyncScheduler, RoutingSyncScheduler
from kvcache.retention import AfterPrompt, KeepAll, RetentionPolicy
from kvcache.spans import Span
from tests.adapter.kv_world import SMALL, Life, World, read_and_generate
from vllm_ext.platforms import selection

BLOCK = SMALL.block
SPAN = Span(6, 13)


def test_outputs_carry_routes_to_another_process() -> None:
    output = with_routes(ModelRunnerOutput(["a"], {"a": 0}), {"a": 3})
    assert routes_of(pickle.loads(pickle.dumps(output))) == {"a": 3}
    assert routes_of(EMPTY_MODEL_RUNNER_OUTPUT) == {}
    empty = with_routes(EMPTY_MODEL_RUNNER_OUTPUT, {"b": 0})
    assert (routes_of(empty), empty.req_ids) == ({"b": 0}, [])
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, ATTRIBUTE), "it is everybody's"
    with pytest.raises(TypeError, match=r"int cannot carry the routes of \['a'\]"):
        with_routes(3, {"a": 3})


def test_outputs_that_are_still_on_a_device_carry_them_too() -> None:
    class Late(AsyncModelRunnerOutput):
        def get_output(self) -> ModelRunnerOutput:
            return ModelRunnerOutput(["a"], {"a": 0})

    output = with_routes(Late(), {"a": 1})
    assert isinstance(output, AsyncModelRunnerOutput)
    assert routes_of(output.get_output()) == {"a": 1}


def _world(*policies: RetentionPolicy) -> World:
    return World(
        {f"layer.{index}": policy for index, policy in enumerate(policies)},
        seed=1,
        num_blocks=300,
        caching=True,
    )


def _gaps(world: World, life: Life) -> list[int]:
    """Blocks that each group has freed."""
    return [sum(block.is_null for block in blocks) for blocks in world.tables(life)]


def _tell(world: World, life: Life, route: int) -> None:
    output = with_routes(ModelRunnerOutput([], {}), {life.request.request_id: route})
    world.routes.update_from_output(SimpleNamespace(), output)


def test_a_group_frees_once_its_route_is_known_and_never_where_it_is_full() -> None:
    world = _world(AfterPrompt(SPAN, 0), AfterPrompt(SPAN, 1), AfterPrompt(SPAN))
    life = world.request(range(101))
    read_and_generate(world, life, range(200, 203))
    assert _gaps(world, life) == [0, 0, 20]
    _tell(world, life, 0b01)
    _tell(world, life, 0b00)  # decided once: void
    read_and_generate(world, life, range(203, 204))
    assert _gaps(world, life) == [0, 21, 21]
    world.stop(life, "preempt")
    assert world.routes.known() == {life.request.request_id}
    read_and_generate(world, life, range(204, 206))
    assert _gaps(world, life)[0] == 0
    assert _gaps(world, life)[1] == _gaps(world, life)[2] > 0
    name = life.request.request_id
    world.stop(life, "abort")
    world.routes.begin()
    assert world.routes.known() == set()
    _tell(world, life, 0b01)  # of a step that was under way
    assert world.routes.known() == set()
    assert name not in world.routes.requests
    assert world.manager.block_pool.get_num_free_blocks() == world.num_blocks - 1


@pytest.mark.parametrize("reread_tokens", [1, 8, 9, 32])
@pytest.mark.parametrize("num_tokens", [5, 40, 41, 43, 101])
def test_the_last_tokens_of_a_request_are_computed_even_where_they_are_cached(
    reread_tokens: int, num_tokens: int
) -> None:
    """However many groups look, and whether or not the first of them keeps everything."""
    kept = KeepAll(False, reread_tokens)
    routed = [AfterPrompt(SPAN, group, reread_tokens) for group in (0, 1, None)]
    for policies in ((kept, *routed), tuple(routed), (routed[0],), (kept,)):
        world = _world(*policies)
        read_and_generate(world, world.request(range(num_tokens)), range(0))
        again = world.request(range(num_tokens))
        num_hit = world.manager.get_computed_blocks(again.request)[1]
        most = max(0, num_tokens - reread_tokens) // BLOCK * BLOCK
        assert most - BLOCK <= num_hit <= most
        if reread_tokens % BLOCK == 0:
            assert num_hit == most


@pytest.mark.parametrize(
    ("ours", "stock"),
    [(RoutingSyncScheduler, Scheduler), (RoutingAsyncScheduler, AsyncScheduler)],
)
def test_schedulers_learn_before_a_step_may_end_requests(
    ours: type, stock: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = _world(AfterPrompt(SPAN, 0))
    life = world.request(range(50))
    seen: list[set[str]] = []
    for name in ("schedule", "update_from_output"):
        monkeypatch.setattr(stock, name, lambda self, *_: seen.append(world.routes.known()))
    scheduler: Any = ours.__new__(ours)
    scheduler.kv_cache_manager, scheduler.finished_req_ids = world.manager, set()
    scheduler.requests = {life.request.request_id: life.request}
    output = with_routes(ModelRunnerOutput([], {}), {life.request.request_id: 0, "gone": 1})
    scheduler.update_from_output(None, output)
    scheduler.schedule()
    scheduler.finished_req_ids = {life.request.request_id}
    scheduler.schedule()
    assert seen == [{life.request.request_id}, {life.request.request_id}, set()]


def _scheduler_config(cls: Any, is_async: bool) -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls=cls, async_scheduling=is_async)
    )


@pytest.mark.parametrize("is_async", [False, True])
def test_the_scheduler_is_ours_or_it_is_refused(is_async: bool) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    config, method = _scheduler_config(None, is_async), load_method("FLUX")
    for _ in range(2):  # vLLM may look at a configuration again
        selection._choose_scheduler(method, config)
        chosen = resolve_obj_by_qualname(config.scheduler_config.scheduler_cls)
        assert chosen is (RoutingAsyncScheduler if is_async else RoutingSyncScheduler)
    with pytest.raises(ConfigError, match=r"--scheduler-cls my\.Own would not learn; drop it"):
        selection._choose_scheduler(method, _scheduler_config("my.Own", is_async))


SCHEDULE = LayerSchedule(
    (LayerRole.DENSE, LayerRole.WINDOW),
    spans={1: (SPAN,) * 2},
    prompts_see_everything=True,
    routed_groups=((1,),),
)
GEOMETRY = Geometry(2, 2, 4, 32, 32, 4, 512)


class _Counters:
    def __init__(self) -> None:
        self.routes: Counter[tuple[int, str]] = Counter()

    def add(self, rows: Any) -> None:
        """Not looked at."""

    def add_routes(self, routes: Any) -> None:
        self.routes.update(routes)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A layer of an engine, and its planner, whose requests are in the book."""
    monkeypatch.setattr(BOOK, "_dense_until", {"a": 40, "b": 90})
    monkeypatch.setattr(BOOK, "num_rows", 2)
    monkeypatch.setattr(BOOK, "row_ids", lambda places: ["a", "b"])
    layer, counters = torch.nn.Identity(), _Counters()
    selector = AnswerWindowSelector(
        SCHEDULE, GEOMETRY, torch.device("cpu"), Router.forced(1, 2, 2, is_full=False)
    )
    split: Any = SplitEngine(GEOMETRY, 64)
    ours: Any = counters
    planner = shared_planner(
        layer, GEOMETRY, SCHEDULE, lambda _: StepPlanner(selector, SCHEDULE, ours, split)
    )
    monkeypatch.setattr(planning, "attention_layers", lambda config: {"layer": layer})
    return SimpleNamespace(planner=planner, counters=counters)


def _step(engine: Any, queries: list[range]) -> None:
    none = torch.zeros(0, dtype=torch.int32)
    BOOK.num_rows = len(queries)  # sampling ends a step
    engine.planner.plan(object(), none, none, len(queries), prefill_queries=queries)
    engine.planner.forget_step()


def test_a_worker_tells_the_routes_of_prompts_that_a_step_ended(engine: Any) -> None:
    outputs = iter([ModelRunnerOutput([], {}), None, ModelRunnerOutput([], {})])

    class Stock:
        def sample_tokens(self, grammar_output: Any) -> Any:
            return next(outputs)

    class Worker(RetainingWorker, Stock):
        """As on GPUs."""

    worker = Worker()
    worker.vllm_config = SimpleNamespace()
    _step(engine, [range(0, 30), range(0, 64)])
    output = worker.sample_tokens(None)
    assert not hasattr(output, ATTRIBUTE), "no prompt ended"
    _step(engine, [range(30, 40), range(64, 80)])
    assert worker.sample_tokens(None) is None, "nothing could carry them"
    assert routes_of(worker.sample_tokens(None)) == {"a": 0}
    assert engine.counters.routes == {(0, "sparse"): 1}
    assert take_routes(worker.vllm_config) == {}


def test_layers_of_two_shapes_cannot_be_routed_together(engine: Any) -> None:
    owner = next(iter(planning.attention_layers(SimpleNamespace()).values()))  # type: ignore[arg-type]
    other = Geometry(2, 1, 4, 32, 32, 4, 512)
    with pytest.raises(ConfigError, match="cannot share a selection"):
        shared_planner(owner, other, SCHEDULE, lambda _: engine.planner)
