"""What a decode step launches depends on the number of its rows alone.

A CUDA graph that was captured for a number of rows is replayed for every batch of that size, so
all that differs between such batches must be data in the same buffers. This test needs no GPU: it
writes down, per step, every call of an op with the addresses and shapes of its tensors and its
Python scalars, and finds it equal for any two decode batches of one size. Padding counts: rows
without tokens fill a batch up to a graph's size. And since a replayed graph may have a prompt's
last token among its rows, that row's answer is compared with what prefill would have given it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_backends.batch import PagedBatch, RowOptions
from attn_backends.config import parse_config
from attn_backends.layer_step import LayerStep, StepBatch
from attn_backends.method import Geometry, StepRows
from attn_backends.methods import REGISTRY, load_method
from attn_backends.ops.dispatch import OpContext, OpImpl
from attn_backends.ops.resolution import ORDER_OF_DEVICE, Ops, resolve_ops
from attn_backends.plan import LayerPlan
from kvcache.layout import PagedKVLayout, kv_views
from kvcache.spans import EVERYTHING_TOKENS
from tests.flux_profile import write_routed_profile
from tests.profiles import NUM_KV_HEADS, NUM_LAYERS, write_profile

ROWS, QUERY_HEADS, HEAD, BLOCK = 3, 4, 32, 32
LAYERS, KV_HEADS = NUM_LAYERS, NUM_KV_HEADS
MAX_MODEL_LEN = 2048
BLOCKS = MAX_MODEL_LEN // BLOCK
ORDER = ORDER_OF_DEVICE["cpu"]
GEOMETRY = Geometry(LAYERS, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, 8, MAX_MODEL_LEN)
BY_HAND = "by hand"  # stands for a profile that the test writes
ROUTED = "routed"  # and for one with routers
# Besides its defaults, what a method can be told that changes what its layers do.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in REGISTRY if not load_method(name).needs_profile],
    *[(name, {"profile": BY_HAND}) for name in REGISTRY if load_method(name).profile_section],
    ("FLUX", {"profile": ROUTED}),
    ("FLUX", {"profile": ROUTED, "routes": "full"}),
    ("TIDAL_DECODE", {"anchor_attention": "full"}),
    (
        "TIDAL_DECODE",
        {
            "policy": {
                "layers": [{"layers": 3, "role": "window", "sink_tokens": 32, "window_tokens": 64}],
                "budgets": [{"up_to_tokens": 1500, "budget_tokens": "all"}],
            }
        },
    ),
]


def _told(value: Any) -> Any:
    """What a launch is told: addresses and shapes of tensors, everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    if is_dataclass(value):
        return [(one.name, _told(getattr(value, one.name))) for one in fields(value)]
    return value


@dataclass(frozen=True)
class _Batch:
    """What differs between two batches of a size; rows of no tokens are padding."""

    seq_lens: list[int]
    request_ids: tuple[str, ...]
    options: Mapping[int, RowOptions]
    ended_ids: tuple[str, ...] = ()
    prompt_rows: tuple[int, ...] = ()
    dense_until: tuple[int | None, ...] = ()


CAPTURED = _Batch([1, 1, 1], (), {})  # as vLLM captures: rows of nobody, of one token
BATCHES = [
    _Batch([2000, 1900, 1800], ("a", "b", "c"), {}),
    _Batch([1, 2, 31], ("d", "e", "f"), {}, ended_ids=("a", "b", "c")),
    _Batch([2048, 5, 1025], ("g", "h", "i"), {}),
    _Batch([1700, 1700, 1700], ("g", "h", "i"), {0: RowOptions(is_dense=True)}),
    _Batch(
        [1999, 64, 1500],
        ("i", "j", "g"),  # one was preempted, another took its row
        {1: RowOptions(budget_tokens=256), 2: RowOptions(budget_factor=2.0)},
    ),
    _Batch([300, 1200, 2047], (), {}),  # of a worker that does not tell ids
    _Batch([1800, 0, 0], ("k",), {0: RowOptions(budget_tokens=512)}),
    _Batch([0, 0, 0], (), {}),
    _Batch([1600, 1999, 0], ("l", "m"), {0: RowOptions(is_dense=True)}, prompt_rows=(1,)),
    _Batch([1, 1500, 1999], ("n", "o", "p"), {}, prompt_rows=(0, 2)),
    _Batch([2000, 1900, 0], ("q", "r"), {}, prompt_rows=(1,), dense_until=(1999, 1950, None)),
    _Batch([2000, 9, 1800], ("q", "r", "s"), {}, dense_until=(EVERYTHING_TOKENS, 8, 7)),
]


class _Engine:
    """One method's layers over one cache, with persistent buffers as an engine has them."""

    def __init__(self, method_name: str, settings: dict[str, Any]) -> None:
        method = load_method(method_name)
        config = parse_config(method.config_cls, settings, method.name)
        schedule = method.schedule(config, GEOMETRY)
        self.selector = method.make_selector(config, schedule, GEOMETRY, torch.device("cpu"))
        self.calls: list[Any] = []
        self.answers: list[tuple[LayerPlan, torch.Tensor]] = []  # by layer
        layout = PagedKVLayout(BLOCKS, BLOCK, KV_HEADS, HEAD, torch.float32, ORDER)
        context = OpContext(layout, QUERY_HEADS, "cpu", bool(schedule.spans))
        ops = resolve_ops(context, "reference")
        self.ops = Ops(*(self._recorded(getattr(ops, one.name)) for one in fields(ops)))
        self.cache = torch.randn(layout.shape)
        self.query = torch.randn(ROWS, QUERY_HEADS, HEAD)
        self.out = torch.empty_like(self.query)
        self.seq_lens = torch.zeros(ROWS, dtype=torch.int32)
        self.starts = torch.arange(ROWS + 1, dtype=torch.int32)
        self.table = torch.arange(BLOCKS, dtype=torch.int32).repeat(ROWS, 1)

    def _recorded(self, op: OpImpl) -> OpImpl:
        def run(*arguments: Any) -> None:
            self.calls.append((op.op, [_told(one) for one in arguments]))
            op.run(*arguments)

        return OpImpl(op.op, op.name, run, op.unsupported_reason)

    def step(self, batch: _Batch) -> list[Any]:
        """Runs a decode step; every call it made."""
        self.calls = []
        lengths = torch.tensor(batch.seq_lens, dtype=torch.int32)
        self.seq_lens.copy_(lengths)
        paged = PagedBatch(
            self.starts, self.seq_lens, self.table, ROWS, ROWS, 1, max(batch.seq_lens)
        )
        rows = StepRows(
            self.seq_lens,
            lengths,
            ROWS,
            batch.request_ids,
            batch.options,
            batch.ended_ids,
            batch.prompt_rows,
            batch.dense_until,
        )
        plan = self.selector.plan(rows)
        step = StepBatch.split(paged, ROWS, MAX_MODEL_LEN)
        self.answers = []
        for layer in sorted(plan.layers):
            views = kv_views(self.cache, ORDER)
            LayerStep(plan.layers[layer], step, self.ops, views, 0.2).attend(self.query, self.out)
            self.answers.append((plan.layers[layer], self.out.clone()))
        return self.calls

    def prefilled(self, row: int, plan: LayerPlan) -> torch.Tensor:
        """What prefill answers a row, ``[num_heads, head_size]``."""
        batch = PagedBatch(
            self.starts[:2], self.seq_lens[row : row + 1], self.table[row : row + 1], 1, 1, 1, 2048
        )
        rule = None if plan.rule is None else plan.rule.rows(row, row + 1)
        step = LayerStep(
            replace(plan, rule=rule),
            StepBatch(None, batch),
            self.ops,
            kv_views(self.cache, ORDER),
            0.2,
        )
        out = torch.empty_like(self.query[:1])
        step.attend(self.query[row : row + 1], out)
        return out[0]


@pytest.fixture
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A case's own; spans of heads come from a file, which no model of the tests has."""
    given: dict[str, Any] = request.param
    if given.get("profile") == ROUTED:
        shape = (2, LAYERS, KV_HEADS)
        router = {"weights": torch.ones(shape), "log_tokens": torch.zeros(2)}
        router["bias"] = torch.tensor([1.0, -1.0])
        path = tmp_path / "profile.json"
        return given | {"profile": write_routed_profile(path, [0], [[1, 3], [2]], router)}
    if given.get("profile") == BY_HAND:
        return given | {"profile": write_profile(tmp_path / "profile.json")}
    return given


by_case = pytest.mark.parametrize(
    ("method_name", "settings"), SETTINGS, ids=str, indirect=["settings"]
)


@by_case
def test_launches_depend_on_the_number_of_rows_alone(
    method_name: str, settings: dict[str, Any]
) -> None:
    engine = _Engine(method_name, settings)
    captured = engine.step(CAPTURED)
    assert len(captured) >= LAYERS - 1  # a profile drops one
    for batch in BATCHES:
        assert engine.step(batch) == captured, f"another launch for {batch}"


@by_case
def test_a_prompt_token_among_decode_rows_is_answered_as_prefill_answers_it(
    method_name: str, settings: dict[str, Any]
) -> None:
    engine = _Engine(method_name, settings)
    engine.step(_Batch([1900, 1999, 0], ("a", "b"), {}, prompt_rows=(1,)))
    for plan, out in engine.answers:
        torch.testing.assert_close(out[1], engine.prefilled(1, plan))
        assert not out[2].any(), "padding reads nothing"
    if method_name == "TIDAL_DECODE":
        plan, out = engine.answers[-1]
        assert not torch.allclose(out[0], engine.prefilled(0, plan)), "nothing is left out"


@by_case
def test_no_step_waits_for_the_device(method_name: str, settings: dict[str, Any]) -> None:
    """Tensors without memory stand for a device's: to read one on the host is an error."""
    meta = torch.device("meta")
    method = load_method(method_name)
    config = parse_config(method.config_cls, settings, method.name)
    schedule = method.schedule(config, GEOMETRY)
    selector = method.make_selector(config, schedule, GEOMETRY, meta)
    launched: list[str] = []
    names = [one.name for one in fields(Ops)]
    no_ops = (
        OpImpl(name, name, lambda *_, name=name: launched.append(name), lambda context: None)
        for name in names
    )
    lengths = torch.tensor([1800, 1999, 0], dtype=torch.int32)
    on_device = lengths.to(meta)
    plan = selector.plan(
        StepRows(
            on_device,
            lengths,
            ROWS,
            ("a", "b"),
            {0: RowOptions(budget_tokens=256)},
            prompt_rows=(1,),
        )
    )
    assert plan.watch is None
    starts, table = (torch.empty(size, dtype=torch.int32, device=meta) for size in (4, (3, BLOCKS)))
    batch = PagedBatch(starts, on_device, table, ROWS, ROWS, 1, 1999)
    step, ops = StepBatch.split(batch, ROWS, MAX_MODEL_LEN), Ops(*no_ops)
    cache = torch.empty(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD, device=meta)
    query = torch.empty(ROWS, QUERY_HEADS, HEAD, device=meta)
    for layer in plan.layers.values():
        views = kv_views(cache, ORDER_OF_DEVICE["cuda"])
        LayerStep(layer, step, ops, views, 0.2).attend(query, torch.empty_like(query))
    assert len(launched) >= LAYERS - 1
