"""Routes against plain readings of their rule: evidence, routers, and what rows then read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from attn_backends import evidence
from attn_backends.answer_windows import AnswerWindowSelector, answer_entries
from attn_backends.batch import PagedBatch
from attn_backends.config import ConfigError, SettingError
from attn_backends.evidence import gap_mass
from attn_backends.layer_step import LayerStep, StepBatch, ops_of
from attn_backends.method import Geometry, StepRows
from attn_backends.methods.flux import METHOD, FluxConfig
from attn_backends.ops.dispatch import OpContext
from attn_backends.ops.resolution import ORDER_OF_DEVICE, resolve_ops
from attn_backends.plan import LayerRole, LayerSchedule, RowReason, Selected, StepPlan
from attn_backends.routed_prompts import RoutedPrompts
from attn_backends.routing import RouteBook, Router, read_router
from kvcache.layout import PagedKVLayout, kv_views
from kvcache.retention import AfterPrompt, KeepAll
from kvcache.spans import EVERYTHING_TOKENS, Span
from tests.flux_profile import ROUTER_FILE, write_profile, write_routed_profile

CPU, BLOCK, MAX_LEN, SCALE = torch.device("cpu"), 16, 512, 0.3
LAYERS, KV_HEADS, QUERY_HEADS, HEAD = 4, 2, 4, 32
GEOMETRY = Geometry(LAYERS, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, 4, MAX_LEN)
SPAN, GROUPS, EVIDENCE_TOKENS = Span(20, 40), ((1,), (2,)), 32
SCHEDULE = LayerSchedule(  # layer 0 is full, layer 3 always has the window
    (LayerRole.DENSE, *(LayerRole.WINDOW,) * 3),
    spans=dict.fromkeys((1, 2, 3), (SPAN,) * KV_HEADS),
    prompts_see_everything=True,
    routed_groups=GROUPS,
)
BATCHES = st.lists(st.tuples(st.integers(1, MAX_LEN), st.integers(0, 3)), min_size=1, max_size=4)


def _router(bias: Sequence[float] = (0.0, 0.0)) -> Router:
    """Layers 0 and 2 are witnesses."""
    torch.manual_seed(1)
    weights = torch.zeros(2, LAYERS, KV_HEADS, dtype=torch.float64)
    weights[:, [0, 2]] = torch.rand(2, 2, KV_HEADS, dtype=torch.float64)
    log_tokens = torch.tensor([0.1, -0.05], dtype=torch.float64)
    return Router(weights, log_tokens, torch.tensor(bias, dtype=torch.float64), EVIDENCE_TOKENS)


def _hides(position: int, token: int) -> bool:
    return SPAN.sink_tokens <= token <= position - SPAN.floor_tokens


class _Model:
    """Queries and keys of one request in every layer, and a selector that serves it."""

    def __init__(self, num_tokens: int, router: Router | None = None) -> None:
        torch.manual_seed(0)
        blocks = MAX_LEN // BLOCK
        order = ORDER_OF_DEVICE["cpu"]
        layout = PagedKVLayout(blocks, BLOCK, KV_HEADS, HEAD, torch.float32, order)
        self.queries = torch.randn(LAYERS, num_tokens, QUERY_HEADS, HEAD)
        self.views = [kv_views(torch.randn(layout.shape), order) for _ in range(LAYERS)]
        self.table = torch.randperm(blocks).int()[None]
        self.router = router or _router()
        self.selector = AnswerWindowSelector(SCHEDULE, GEOMETRY, CPU, self.router)
        contexts = (OpContext(layout, QUERY_HEADS, "cpu", ruled) for ruled in (False, True))
        plain, ruled = (resolve_ops(context, "reference") for context in contexts)
        self.ops = plain, ruled

    @property
    def prompts(self) -> RoutedPrompts:
        """The selector's."""
        plan = self.plan(range(0), 1)
        assert plan.prompts is not None
        return plan.prompts

    def plan(self, queries: range, prompt: int, name: str = "r", *ended: str) -> StepPlan:
        """Of a step with a chunk of the request, as prefill; an empty one is a step of nobody."""
        none = torch.zeros(0, dtype=torch.int32)
        if not queries:
            return self.selector.plan(StepRows(none, none, 0, ended_ids=ended))
        rows = StepRows(
            *(none, none, 1, (name,)),
            ended_ids=ended,
            dense_until=[prompt],
            prefill_queries=[queries],
        )
        return self.selector.plan(rows)

    def step(self, queries: range, prompt: int, name: str = "r", beside: int = 0) -> torch.Tensor:
        """Serves a chunk, behind another one of ``beside`` tokens; what the layers answer."""
        none = torch.zeros(0, dtype=torch.int32)
        own = [range(beside)] * bool(beside) + [queries]
        rows = StepRows(
            *(none, none, len(own), (*("other",) * bool(beside), name)),
            dense_until=[*(beside + 1,) * bool(beside), prompt],
            prefill_queries=own,
        )
        plan = self.selector.plan(rows)
        starts = torch.tensor([0, *(len(one) for one in own)]).cumsum(0).int()
        stops = torch.tensor([one.stop for one in own], dtype=torch.int32)
        tokens = [*range(beside), *queries]
        tables = self.table.repeat(len(own), 1)
        batch = PagedBatch(
            starts, stops, tables, len(own), len(tokens), max(map(len, own)), MAX_LEN
        )
        step = StepBatch.split(batch, 0, MAX_LEN).cut(plan.cuts)
        out = torch.full((LAYERS, len(tokens), QUERY_HEADS, HEAD), torch.nan)
        for layer, views in enumerate(self.views):
            one = plan.layers[layer]
            served = LayerStep(one, step, ops_of(one, self.ops), views, SCALE)
            served.attend(self.queries[layer, tokens], out[layer])
        return out[:, beside:]

    def mass(self, layer: int, prompt: int) -> torch.Tensor:
        """The evidence of a layer, by its definition."""
        keys = self.views[layer][0][self.table[0].long()].transpose(1, 2).flatten(0, 1)
        found = torch.zeros(KV_HEADS, dtype=torch.float64)
        positions = range(max(0, prompt - EVIDENCE_TOKENS), prompt)
        for position in positions:
            for head in range(QUERY_HEADS):
                kv_head = head // (QUERY_HEADS // KV_HEADS)
                scores = keys[: position + 1, kv_head] @ self.queries[layer, position, head]
                weights = (scores.double() * SCALE).softmax(0)
                hidden = [weights[t] for t in range(position + 1) if _hides(position, t)]
                found[kv_head] += sum(hidden) / (QUERY_HEADS // KV_HEADS) / len(positions)
        return found

    def expected(self, prompt: int) -> torch.Tensor:
        """All evidence."""
        mass = torch.zeros(LAYERS, KV_HEADS, dtype=torch.float64)
        for layer in (0, 2):
            mass[layer] = self.mass(layer, prompt)
        return mass


@settings(max_examples=60, deadline=None)
@given(first=st.integers(0, 260), count=st.integers(1, 40), sinks=st.integers(0, 60))
def test_gap_mass_is_what_the_span_would_hide(first: int, count: int, sinks: int) -> None:
    model, span = _Model(300), Span(sinks, 40)
    query, keys = model.queries[0, first : first + count], model.views[0][0]
    for unwritten in range(first + count, MAX_LEN):
        keys[model.table[0, unwritten // BLOCK], :, unwritten % BLOCK] = torch.nan
    with patch.object(evidence, "PIECE_TOKENS", 64):
        got = gap_mass(query, keys, model.table[0], first, SCALE, span)
    whole = keys[model.table[0].long()].transpose(1, 2).flatten(0, 1)[: first + count]
    whole = whole.repeat_interleave(QUERY_HEADS // KV_HEADS, 1)
    scores = torch.einsum("phd,thd->hpt", query, whole).double() * SCALE
    token, position = torch.arange(first + count), torch.arange(first, first + count)[:, None]
    weights = scores.masked_fill(token > position, -torch.inf).softmax(-1)
    gap = weights * ((token >= sinks) & (token <= position - 40))
    expected = gap.sum((1, 2)).view(KV_HEADS, -1).mean(1)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)


def _evidence_after(
    model: _Model, steps: Sequence[range], prompt: int, beside: int = 0
) -> torch.Tensor | None:
    for queries in steps:
        model.step(queries, prompt, beside=beside)
    routed = model.selector._prompts
    assert routed is not None
    return routed._evidence.take("r", prompt)


SINGLE = (1,) * 200


@pytest.mark.parametrize("prompt", [10, 61, 90, 200])
@pytest.mark.parametrize(
    "chunks", [(200,), (64, 64, 72), (190, 10), SINGLE, (169, 1, 30), (199, 1)], ids=len
)
@pytest.mark.parametrize("beside", [0, 7])
def test_evidence_is_the_same_however_a_prompt_is_chunked(
    chunks: Sequence[int], prompt: int, beside: int
) -> None:
    starts = [sum(chunks[:index]) for index in range(len(chunks))]
    steps = [
        range(start, min(start + tokens, prompt))
        for start, tokens in zip(starts, chunks, strict=True)
        if start < prompt
    ]
    model = _Model(200)
    found, expected = _evidence_after(model, steps, prompt, beside), model.expected(prompt)
    assert found is not None
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_route_follows_from_scores() -> None:
    router, prompt = _router(), 200
    model = _Model(prompt, router)
    mass = model.expected(prompt)
    by_hand = [
        float((router.weights[group] * mass).sum()) + float(slope) * math.log(prompt)
        for group, slope in enumerate(router.log_tokens)
    ]
    assert router.scores(mass, prompt).tolist() == pytest.approx(by_hand)
    # Thresholds beside the scores: more than rounding apart.
    for margin, expected in (((-0.01, -0.01), 0b11), ((-0.01, 0.01), 0b01), ((0.01, -0.01), 0)):
        bias = [-score - one for score, one in zip(by_hand, margin, strict=True)]
        model = _Model(prompt, _router(bias))
        for queries in (range(0, 180), range(180, 200)):
            assert model.prompts.take_news() == {}
            model.step(queries, prompt)
        assert model.prompts.take_news() == {"r": expected}
        assert model.prompts.take_news() == {}, "said once"


@pytest.mark.parametrize(
    "steps",
    [
        [range(0, 200)],
        [range(168, 200)],  # behind a prefix hit
        [range(160, 190), range(190, 200)],
        [range(0, 180), range(0, 200)],  # preempted with part of its evidence read
        [range(0, 199), range(160, 200)],  # and a hit when it starts again
        [range(0, 180), range(168, 199), range(199, 200)],
    ],
    ids=str,
)
def test_evidence_begins_anew_where_a_row_does(steps: Sequence[range]) -> None:
    model = _Model(200)
    found = _evidence_after(model, steps, 200)
    assert found is not None
    torch.testing.assert_close(found.double(), model.expected(200), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "steps",
    [
        [range(169, 200)],
        [range(0, 170), range(171, 200)],
        [range(0, 168)],
        [range(0, 180), range(0, 160), range(170, 200)],
    ],
    ids=str,
)
def test_evidence_with_a_query_missing_is_none(steps: Sequence[range]) -> None:
    assert _evidence_after(_Model(200), steps, 200) is None


def test_a_prompt_without_evidence_is_read_in_full_and_counted_so() -> None:
    model = _Model(200, _router((-9.0, -9.0)))
    model.step(range(0, 150), 200)
    model.plan(range(199, 200), 200)
    assert model.prompts.take_news() == {"r": 0b11}
    assert model.prompts.take_counts() == {(0, "no_evidence"): 1, (1, "no_evidence"): 1}
    # An answer whose prompt nobody saw is one, too.
    model.plan(range(300, 310), 200, "s")
    assert model.prompts.take_news() == {"s": 0b11}


@settings(max_examples=100, deadline=None)
@given(scores=st.lists(st.sampled_from([-1.0, 0.0, 1e-6, 2.0]), min_size=1, max_size=8))
def test_groups_are_full_up_to_the_first_that_does_not_ask(scores: list[float]) -> None:
    router = Router.forced(len(scores), LAYERS, KV_HEADS, is_full=True)
    router = replace(router, bias=torch.tensor(scores, dtype=torch.float64))
    route = router.route(torch.zeros(LAYERS, KV_HEADS), 10)
    full = [all(score > 0 for score in scores[: group + 1]) for group in range(len(scores))]
    assert [bool(route >> group & 1) for group in range(len(scores))] == full
    assert (router.witnesses, router.reread_tokens) == ((), 0)


def test_a_route_is_decided_once_and_kept_until_the_request_ends() -> None:
    book = RouteBook()
    book.decide("a", 1)
    book.decide("a", 3)
    assert (book.get("a"), book.get("b"), book.take_news()) == (1, None, {"a": 1})
    book.decide("b", 0)
    book.forget(["a", "b", "unknown"])
    assert (book.get("a"), book.take_news()) == (None, {})
    model = _Model(200, _router((9.0, -9.0)))
    model.step(range(0, 90), 90)
    assert model.prompts.take_news() == {"r": 1}
    model.step(range(0, 90), 90)  # preempted
    assert model.prompts.take_news() == {}
    model.plan(range(0), 0, "", "r")
    model.step(range(0, 70), 70)  # another request of this name
    assert model.prompts.take_news() == {"r": 1}
    assert model.prompts.take_counts() == {(0, "full"): 2, (1, "sparse"): 2}


def _decide(selector: AnswerWindowSelector, routes: dict[str, int]) -> None:
    prompts = selector._prompts
    assert prompts is not None
    for name, route in routes.items():
        prompts._book.decide(name, route)


@settings(max_examples=60, deadline=None)
@given(rows=BATCHES, prompt=st.integers(1, MAX_LEN))
def test_decode_rows_read_by_their_routes(rows: list[tuple[int, int]], prompt: int) -> None:
    selector = AnswerWindowSelector(SCHEDULE, GEOMETRY, CPU, _router())
    names = [f"r{row}" for row in range(len(rows))]
    _decide(selector, dict(zip(names, (0b01 if r == 2 else r for _, r in rows), strict=True)))
    lengths = torch.tensor([seq_len for seq_len, _ in rows], dtype=torch.int32)
    ends = [prompt] * len(rows)
    plan = selector.plan(StepRows(lengths, lengths, len(rows), names, dense_until=ends))
    for layer, group in ((1, 0), (2, 1), (3, None)):
        way, rule = plan.layers[layer].decode, plan.layers[layer].rule
        assert isinstance(way, Selected)
        assert rule is not None
        for row, (seq_len, drawn) in enumerate(rows):
            route = 0b01 if drawn == 2 else drawn
            is_full = group is not None and bool(route >> group & 1)
            last = seq_len - 1
            seen = [t for t in range(seq_len) if is_full or last < prompt or not _hides(last, t)]
            count = int(way.selection.counts[row, 0])
            assert way.selection.logical_blocks[row, 0, :count].tolist() == sorted(
                {t // BLOCK for t in seen}
            )
            visible = rule.sees(row, 1, torch.tensor(last), torch.arange(seq_len))
            assert visible[0].nonzero().flatten().tolist() == seen


@pytest.mark.parametrize("route", [0b00, 0b01, 0b11])
@pytest.mark.parametrize("chunks", [(200,), (64, 64, 64, 8), (128, 72)], ids=str)
def test_an_answer_that_is_computed_again_is_read_by_its_route(
    chunks: Sequence[int], route: int
) -> None:
    prompt, model = 129, _Model(200)
    _decide(model.selector, {"r": route})
    found, start = [], 0
    for tokens in chunks:
        found.append(model.step(range(start, start + tokens), prompt, beside=5))
        start += tokens
    answers = torch.cat(found, 1)
    position, token = torch.arange(200)[:, None], torch.arange(200)
    near = (token < SPAN.sink_tokens) | (token > position - SPAN.floor_tokens)
    for layer, is_full in enumerate([True, bool(route & 1), bool(route & 2), False]):
        seen = (token <= position) & (near | (position < prompt) | torch.tensor(is_full))
        keys, values = (
            view[model.table[0].long()].transpose(1, 2).flatten(0, 1)[:200].repeat_interleave(2, 1)
            for view in model.views[layer]
        )
        scores = torch.einsum("phd,thd->hpt", model.queries[layer], keys) * SCALE
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = torch.einsum("hpt,thd->phd", weights, values)
        torch.testing.assert_close(answers[layer], expected)


def test_reasons_say_where_a_route_leaves_nothing_narrow() -> None:
    no_window = replace(
        SCHEDULE,
        roles=(LayerRole.DENSE, LayerRole.WINDOW, LayerRole.WINDOW, LayerRole.DENSE),
        spans={layer: SCHEDULE.spans[layer] for layer in (1, 2)},
    )
    lengths = torch.tensor([500] * 4, dtype=torch.int32)
    names, ends = ["a", "b", "c", "d"], [10, 10, 10, EVERYTHING_TOKENS]
    rows = StepRows(lengths, lengths, 4, names, dense_until=ends)
    for schedule, full in ((SCHEDULE, RowReason.SELECTED), (no_window, RowReason.ROUTED_FULL)):
        selector = AnswerWindowSelector(schedule, GEOMETRY, CPU, _router())
        _decide(selector, {"a": 0, "b": 1, "c": 3})
        assert selector.plan(rows).reasons == [
            *(RowReason.SELECTED, RowReason.SELECTED, full, RowReason.REQUEST_OFF)
        ]


def test_positions_of_routed_rows_must_be_known() -> None:
    selector = AnswerWindowSelector(SCHEDULE, GEOMETRY, CPU, _router())
    lengths = torch.tensor([50], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="where the queries of r stand"):
        selector.plan(StepRows(lengths, None, 1, ("r",), dense_until=[7]))


def test_layers_without_evidence_have_no_witness() -> None:
    model = _Model(200)
    early, late = model.plan(range(0, 168), 200), model.plan(range(168, 200), 200)
    assert not any(plan.witness for plan in early.layers.values())
    seen = {layer for layer, plan in late.layers.items() if plan.witness is not None}
    assert seen == {0, 2}
    asked = model.plan(range(0, 200), EVERYTHING_TOKENS, "s")
    assert not any(plan.witness for plan in asked.layers.values())


def _tensors(**changes: Any) -> dict[str, torch.Tensor]:
    good = {"weights": torch.ones(2, LAYERS, KV_HEADS), "log_tokens": torch.ones(2)}
    return {**good, "bias": torch.ones(2), **changes}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"bias": torch.ones(3)}, r"bias is torch.float32 \[3\]; it must be torch.float32 \[2\]"),
        ({"weights": torch.ones(2, LAYERS, KV_HEADS).double()}, "weights is torch.float64"),
        ({"weights": torch.ones(2, 3, KV_HEADS)}, "weights is"),
        ({"bias": torch.tensor([1.0, torch.nan])}, "bias has values that are not finite"),
        ({"more": torch.ones(2)}, "it must have weights, log_tokens, bias"),
    ],
)
def test_router_files_that_are_none_are_refused(
    tensors: dict[str, torch.Tensor], message: str
) -> None:
    shape = (2, LAYERS, KV_HEADS)
    read = read_router(save(_tensors()), shape, 32, "r")
    assert (read.num_groups, read.witnesses, read.reread_tokens) == (2, (0, 1, 2, 3), 32)
    with pytest.raises(ConfigError, match=message):
        read_router(save(_tensors(**tensors)), shape, 32, "r")
    with pytest.raises(ConfigError, match="r is not a safetensors file"):
        read_router(b"\x00" * 50, shape, 32, "r")


def test_a_profile_with_routers_says_what_is_kept(tmp_path: Path) -> None:
    geometry = Geometry(LAYERS, KV_HEADS, QUERY_HEADS, HEAD, 32, 8, 4096)
    path = write_routed_profile(tmp_path / "p.json", [0], [[2], [1]], _tensors())
    config = FluxConfig(profile=path)
    schedule = METHOD.schedule(config, geometry)
    assert (schedule.routed_groups, schedule.shares_selections) == (((2,), (1,)), True)
    span = schedule.spans[3][0]
    policies = [entry.policy for entry in METHOD.entries(config, schedule, geometry)]
    assert policies == [
        KeepAll(False, 32),
        AfterPrompt(span, 1, 32),
        AfterPrompt(span, 0, 32),
        AfterPrompt(span, None, 32),
    ]
    assert len({policy.identity for policy in policies}) == 4
    # Forced routes need no evidence, and no router.
    (tmp_path / ROUTER_FILE).unlink()
    for routes, expected in (("full", 0b11), ("sparse", 0b00)):
        forced = FluxConfig(profile=path, routes=routes)
        entries = METHOD.entries(forced, schedule, geometry)
        assert entries == answer_entries(schedule, frees=True)
        selector = METHOD.make_selector(forced, schedule, geometry, CPU)
        none = torch.zeros(0, dtype=torch.int32)
        prompt = StepRows(*(none, none, 1, ("r",)), dense_until=[9], prefill_queries=[range(9)])
        plan = selector.plan(prompt)
        assert plan.prompts is not None
        assert plan.prompts.take_news() == {"r": expected}
    with pytest.raises(ConfigError, match=r"router\.safetensors cannot be read"):
        METHOD.entries(config, schedule, geometry)


def test_a_router_that_is_not_the_profiles_is_refused_before_it_is_read(tmp_path: Path) -> None:
    geometry = Geometry(LAYERS, KV_HEADS, QUERY_HEADS, HEAD, 32, 8, 4096)
    path = write_routed_profile(tmp_path / "p.json", [0], [[2], [1]], _tensors())
    config = FluxConfig(profile=path)
    schedule = METHOD.schedule(config, geometry)
    (tmp_path / ROUTER_FILE).write_bytes(b"other")
    with pytest.raises(ConfigError, match="its SHA-256 differs"):
        METHOD.make_selector(config, schedule, geometry, CPU)
    # As said by the profile, and still not what it should be.
    raw = json.loads(Path(path).read_text())
    raw["methods"]["FLUX"]["router_sha256"] = hashlib.sha256(b"other").hexdigest()
    Path(path).write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"router file router\.safetensors is not"):
        METHOD.make_selector(config, schedule, geometry, CPU)
    away = tmp_path / "away"
    away.mkdir()
    (tmp_path / ROUTER_FILE).rename(away / ROUTER_FILE)
    (tmp_path / ROUTER_FILE).symlink_to(away / ROUTER_FILE)
    with pytest.raises(ConfigError, match="is a link out of the folder"):
        METHOD.make_selector(config, schedule, geometry, CPU)


def test_routes_cannot_be_forced_where_nothing_is_routed(tmp_path: Path) -> None:
    geometry = Geometry(LAYERS, KV_HEADS, QUERY_HEADS, HEAD, 32, 8, 4096)
    path = write_profile(tmp_path / "p.json", LAYERS, KV_HEADS, [0])
    with pytest.raises(SettingError, match=r"vllm_ext.routes is 'full', but the profile has no"):
        METHOD.schedule(FluxConfig(profile=path, routes="full"), geometry)
    with pytest.raises(ValueError, match=r"layers \[0\] are routed, but are no WINDOW layers"):
        replace(SCHEDULE, routed_groups=((0,),))
