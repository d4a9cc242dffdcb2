"""Before the first request every op has run on arguments of every kind that Triton tells apart."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_backends.batch import PagedBatch
from attn_backends.config import parse_config
from attn_backends.head_tables import HeadPlaces, HeadTables
from attn_backends.layer_step import LayerStep, StepBatch, ops_of
from attn_backends.method import Geometry, Selector, StepRows
from attn_backends.methods import load_method
from attn_backends.ops.dispatch import OpContext, OpImpl
from attn_backends.ops.paged_attention.impl.triton import launches
from attn_backends.ops.resolution import ORDER_OF_DEVICE, Ops, resolve_ops
from attn_backends.ops.triton_support import SHARED_BYTES
from attn_backends.split_step import SplitLayerStep
from attn_backends.warm_up import Limits, WarmHeads, WarmLayer, batch_sizes, warm_up
from kvcache.layout import KVOrder, PagedKVLayout, kv_views
from tests import flux_profile, moa_profile

LAYERS, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, MAX_MODEL_LEN, MAX_REQS = 4, 2, 4, 32, 32, 1024, 40
ORDER = ORDER_OF_DEVICE["cpu"]
LIMITS = Limits(MAX_REQS, 2048, MAX_MODEL_LEN)
WINDOW = {"layers": [{"layers": 3, "role": "window", "sink_tokens": 32, "window_tokens": 64}]}
SETTINGS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("SPARSE_FULL", {}, {"sparse_decode", "paged_attention"}),
    ("SINK_WINDOW", {}, {"sparse_decode", "paged_attention"}),
    (
        "FLUX",
        {"profile": "by hand"},
        {"sparse_decode", "dense_decode", "paged_attention"},
    ),
    *[
        (
            "TIDAL_DECODE",
            settings,
            {"anchor_decode", "block_topk", "sparse_decode", "dense_decode", "paged_attention"},
        )
        for settings in ({}, {"anchor_attention": "full"}, {"policy": WINDOW})
    ],
]


def _kinds(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What Triton specialises on, by argument: None, types, 1, and whether 16 divides."""
    if isinstance(value, torch.Tensor):
        yield path, value.dtype
        yield f"{path} address", value.data_ptr() % 16 == 0
        for axis, stride in enumerate(value.stride()[:-1]):
            if value.shape[axis] > 1:
                yield from _kinds(stride, f"{path} stride {axis}")
    elif is_dataclass(value):
        for one in fields(value):
            yield from _kinds(getattr(value, one.name), f"{path}.{one.name}")
    elif isinstance(value, int):
        yield path, (value == 1, value % 16 == 0)
    else:
        yield path, value is None


class _Recorder:
    """Ops that write down the kinds of their arguments and do nothing: no value changes them."""

    def __init__(self, with_rule: bool, num_kv_heads: int = KV_HEADS) -> None:
        layout = PagedKVLayout(2, BLOCK, num_kv_heads, HEAD, torch.float32, ORDER)
        num_query_heads = QUERY_HEADS // KV_HEADS * num_kv_heads
        ops = resolve_ops(OpContext(layout, num_query_heads, "cpu", with_rule), "reference")
        self.seen: set[tuple[str, str, Any]] = set()
        self.ops = Ops(*(self._recorded(getattr(ops, one.name)) for one in fields(ops)))

    def _recorded(self, op: OpImpl) -> OpImpl:
        def run(*arguments: Any) -> None:
            for place, argument in enumerate(arguments):
                self.seen |= {(op.op, *kind) for kind in _kinds(argument, str(place))}

        return OpImpl(op.op, op.name, run, op.unsupported_reason)


def _serve(
    selector: Selector,
    one: WarmLayer,
    table: torch.Tensor,
    generator: random.Random,
    heads: WarmHeads | None,
) -> None:
    """A batch of service: rows and tokens of any number."""
    num_decodes, num_prefills = generator.randint(0, 20), generator.randint(0, 20)
    query_lens = [1] * num_decodes + [generator.randint(2, 40) for _ in range(num_prefills)]
    if not query_lens:
        return
    seq_lens = torch.tensor(
        [generator.randint(tokens, 200) for tokens in query_lens], dtype=torch.int32
    )
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], dtype=torch.int32)
    batch = PagedBatch(
        starts,
        seq_lens,
        table[: len(query_lens)],
        len(query_lens),
        sum(query_lens),
        max(query_lens),
        int(seq_lens.max()),
    )
    plan = selector.plan(
        StepRows(
            seq_lens[:num_decodes],
            seq_lens[:num_decodes],
            len(query_lens),
            dense_until=[generator.choice((None, 20, 150, 1000)) for _ in query_lens],
            prefill_queries=[
                range(end - tokens, end)
                for tokens, end in zip(query_lens, seq_lens.tolist(), strict=True)
            ][num_decodes:],
        )
    )
    step = StepBatch.split(batch, num_decodes, MAX_MODEL_LEN).cut(plan.cuts)
    query = torch.zeros(sum(query_lens), QUERY_HEADS, HEAD)
    for plan_of_layer in plan.layers.values():
        ops = ops_of(plan_of_layer, one.ops)
        layer: Any = LayerStep(plan_of_layer, step, ops, one.views, one.scale)
        if heads is not None and one.places is not None:
            layer = SplitLayerStep(layer, heads.rows(step, len(query_lens)), one.places)
        layer.attend(query, torch.empty_like(query))


@pytest.mark.parametrize(
    ("method_name", "settings", "used"),
    SETTINGS,
    # Names must be the same in every process that tests: a set's order is not.
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_nothing_that_a_step_launches_is_new_after_the_warm_up(
    method_name: str, settings: dict[str, Any], used: set[str], tmp_path: Path
) -> None:
    method = load_method(method_name)
    if "profile" in settings:
        path = flux_profile.write_profile(tmp_path / "profile.json", LAYERS, KV_HEADS, [1])
        settings = settings | {"profile": path}
    config = parse_config(method.config_cls, settings, method.name)
    geometry = Geometry(LAYERS, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, MAX_REQS, MAX_MODEL_LEN)
    schedule = method.schedule(config, geometry)
    selector = method.make_selector(config, schedule, geometry, torch.device("cpu"))
    plain, ruled = _Recorder(with_rule=False), _Recorder(with_rule=bool(schedule.spans))
    cache = torch.randn(2, KV_HEADS, BLOCK, 2 * HEAD)
    one = WarmLayer((plain.ops, ruled.ops), kv_views(cache, ORDER), QUERY_HEADS, 0.2)
    table = torch.zeros(MAX_REQS, MAX_MODEL_LEN // BLOCK, dtype=torch.int32)
    warm_up(selector, dict.fromkeys(range(LAYERS), one), table, LIMITS)
    warm = plain.seen | ruled.seen
    assert {op for op, *_ in warm} == used
    generator = random.Random(0)
    for _ in range(40):
        _serve(selector, one, table, generator, None)
    assert plain.seen | ruled.seen == warm


def test_nothing_is_new_where_heads_keep_different_blocks(tmp_path: Path) -> None:
    """Tiles of a pool: two KV groups, a head of each in every layer."""
    method = load_method("MOA")
    profile = moa_profile.write_profile(
        tmp_path / "profile.json", LAYERS, KV_HEADS, [[0, 64], [-64, 24]]
    )
    config = parse_config(method.config_cls, {"profile": profile}, method.name)
    geometry = Geometry(LAYERS, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, MAX_REQS, MAX_MODEL_LEN)
    schedule = method.schedule(config, geometry)
    cpu = torch.device("cpu")
    selector = method.make_selector(config, schedule, geometry, cpu)
    plain, ruled = _Recorder(False, num_kv_heads=1), _Recorder(True, num_kv_heads=1)
    pool = kv_views(torch.randn(4, 1, BLOCK, 2 * HEAD), ORDER)
    places = HeadPlaces([0, 1], [0, 1], BLOCK, cpu)
    one = WarmLayer((plain.ops, ruled.ops), pool, QUERY_HEADS, 0.2, places)
    blocks = MAX_MODEL_LEN // BLOCK
    sizes = {"max_num_reqs": MAX_REQS, "max_num_tokens": 2048, "max_blocks": blocks}
    table = torch.zeros(MAX_REQS, blocks, dtype=torch.int32)
    heads = WarmHeads(HeadTables.of(KV_HEADS, 2, BLOCK, 2, **sizes, device=cpu), [table, table])
    warm_up(selector, dict.fromkeys(range(LAYERS), one), table, LIMITS, heads)
    warm = plain.seen | ruled.seen
    assert {op for op, *_ in warm} == {"sparse_decode", "paged_attention"}
    generator = random.Random(0)
    for _ in range(40):
        _serve(selector, one, table, generator, heads)
    assert plain.seen | ruled.seen == warm


def test_batches_stay_within_what_the_engine_admits() -> None:
    assert set(batch_sizes(Limits(1, 32, 64))) == {
        (1, 0, 0),
        *((0, 1, tokens) for tokens in (2, 4, 8, 16, 17, 32)),
    }
    assert all(tokens <= 20 for *_, tokens in batch_sizes(Limits(64, 512, 21)))
    decodes = [rows for rows, prefills, _ in batch_sizes(Limits(100, 512, 64)) if not prefills]
    assert decodes == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_size", [64, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_no_length_of_a_prompt_is_compiled_for_in_service(
    group: int, head_size: int, dtype: torch.dtype
) -> None:
    """What a kernel is told besides its arguments follows from the longest prompt, too."""
    device = torch.device("meta")
    layout = PagedKVLayout(4, 16, 2, head_size, dtype, KVOrder.FUSED)
    views = kv_views(torch.empty(layout.shape, dtype=dtype, device=device), KVOrder.FUSED)
    query = torch.empty(600, 2 * group, head_size, dtype=dtype, device=device)
    ints = torch.empty(1, 64, dtype=torch.int32, device=device)

    def kinds(tokens: int) -> Any:
        batch = PagedBatch(ints[0, :2], ints[0, :1], ints, 1, tokens, tokens, 1024)
        (launch,) = launches(query, *views, batch, None, 0.1, query, SHARED_BYTES)
        return launch.constants, launch.num_warps, launch.num_stages

    warm = [
        kinds(tokens) for _, prefills, tokens in batch_sizes(Limits(64, 2048, 4096)) if prefills
    ]
    for tokens in range(2, 600):
        assert kinds(tokens) in warm, tokens
