"""FLUX against a plain-Python reading of its rule: prompts see everything, answers a window."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_backends.answer_windows import AnswerWindowSelector
from attn_backends.batch import PagedBatch
from attn_backends.config import ConfigError
from attn_backends.layer_step import LayerStep, StepBatch, ops_of
from attn_backends.method import Geometry, StepRows
from attn_backends.methods.flux import METHOD, FluxConfig, FluxSection
from attn_backends.ops.dispatch import OpContext
from attn_backends.ops.resolution import ORDER_OF_DEVICE, resolve_ops
from attn_backends.plan import LayerRole, LayerSchedule, RowReason, Selected
from kvcache.entries import KVEntry
from kvcache.layout import PagedKVLayout, kv_views
from kvcache.retention import AfterPrompt, KeepAll
from kvcache.spans import EVERYTHING_TOKENS, Span
from tests.flux_profile import SINK_TOKENS, WINDOW_TOKENS, write_profile

CPU, BLOCK, MAX_LEN = torch.device("cpu"), 16, 512
LAYERS, KV_HEADS, QUERY_HEADS, HEAD = 2, 2, 4, 32
GEOMETRY = Geometry(LAYERS, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, 4, MAX_LEN)
SPAN = Span(20, 40)
ORDER = ORDER_OF_DEVICE["cpu"]


def _selector(span: Span = SPAN) -> AnswerWindowSelector:
    schedule = LayerSchedule(
        (LayerRole.DENSE, LayerRole.WINDOW),
        spans={1: (span,) * KV_HEADS},
        prompts_see_everything=True,
    )
    return AnswerWindowSelector(schedule, GEOMETRY, CPU)


def _sees(position: int, token: int, prompt: int) -> bool:
    is_near = token < SPAN.sink_tokens or token > position - SPAN.floor_tokens
    return token <= position and (position < prompt or is_near)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, MAX_LEN), st.none() | st.integers(1, MAX_LEN)),
        min_size=1,
        max_size=4,
    )
)
def test_decode_rows_read_the_blocks_that_their_position_shows(
    rows: list[tuple[int, int | None]],
) -> None:
    """A request that nobody knows has its window: what else it had may be freed."""
    lengths = torch.tensor([seq_len for seq_len, _ in rows], dtype=torch.int32)
    dense_until = [prompt for _, prompt in rows]
    plan = _selector().plan(StepRows(lengths, lengths, len(rows), dense_until=dense_until))
    way, rule = plan.layers[1].decode, plan.layers[1].rule
    assert isinstance(way, Selected)
    assert rule is not None
    for row, (seq_len, prompt) in enumerate(rows):
        seen = [t for t in range(seq_len) if _sees(seq_len - 1, t, prompt or 0)]
        for head in range(KV_HEADS):
            count = int(way.selection.counts[row, head])
            blocks = way.selection.logical_blocks[row, head].tolist()
            assert blocks[:count] == sorted({t // BLOCK for t in seen})
            assert {*blocks[count:]} <= {-1}
            visible = rule.sees(row, head, torch.tensor(seq_len - 1), torch.arange(seq_len))
            assert visible[0].nonzero().flatten().tolist() == seen


def _attended(
    query: torch.Tensor, cache: torch.Tensor, chunk: range, prompt: int, num_decodes: int = 0
) -> torch.Tensor:
    """The window layer's answers to a chunk of a request whose blocks lie in order; where decode
    kernels serve single tokens, as they would.
    """
    layout = PagedKVLayout(MAX_LEN // BLOCK, BLOCK, KV_HEADS, HEAD, torch.float32, ORDER)
    plain, ruled = (
        resolve_ops(OpContext(layout, QUERY_HEADS, "cpu", with_rule), "reference")
        for with_rule in (False, True)
    )
    lengths = torch.tensor([chunk.stop], dtype=torch.int32)
    table = torch.arange(MAX_LEN // BLOCK, dtype=torch.int32)[None]
    starts = torch.tensor([0, len(chunk)], dtype=torch.int32)
    batch = PagedBatch(starts, lengths, table, 1, len(chunk), len(chunk), MAX_LEN)
    queries = () if num_decodes else (chunk,)
    rows = StepRows(
        lengths[:num_decodes],
        lengths[:num_decodes],
        1,
        dense_until=[prompt],
        prefill_queries=queries,
    )
    plan = _selector().plan(rows)
    step = StepBatch.split(batch, num_decodes, MAX_LEN).cut(plan.cuts)
    out = torch.full_like(query[chunk.start : chunk.stop], torch.nan)
    layer, views = plan.layers[1], kv_views(cache, ORDER)
    LayerStep(layer, step, ops_of(layer, (plain, ruled)), views, 0.3).attend(
        query[chunk.start : chunk.stop], out
    )
    return out


def _expected(query: torch.Tensor, cache: torch.Tensor, prompt: int) -> torch.Tensor:
    keys, values = (view.transpose(1, 2).flatten(0, 1) for view in kv_views(cache, ORDER))
    num_tokens, group = len(query), QUERY_HEADS // KV_HEADS
    visible = torch.tensor(
        [[_sees(p, t, prompt) for t in range(num_tokens)] for p in range(num_tokens)]
    )
    keys, values = (one[:num_tokens].repeat_interleave(group, 1) for one in (keys, values))
    scores = torch.einsum("phd,thd->hpt", query, keys) * 0.3
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hpt,thd->phd", weights, values)


@pytest.mark.parametrize("prompt", [1, 100, 129, 199, 200])
@pytest.mark.parametrize("chunks", [(200,), (64, 64, 64, 8), (128, 72), (1,) * 200], ids=str)
def test_an_answer_that_is_computed_again_sees_its_window_however_it_is_chunked(
    chunks: Sequence[int], prompt: int
) -> None:
    """After a preemption, chunks begin inside the prompt and end behind it."""
    torch.manual_seed(0)
    layout = PagedKVLayout(MAX_LEN // BLOCK, BLOCK, KV_HEADS, HEAD, torch.float32, ORDER)
    query, cache = torch.randn(200, QUERY_HEADS, HEAD), torch.randn(layout.shape)
    found, start = [], 0
    for tokens in chunks:
        chunk = range(start, start + tokens)
        found.append(_attended(query, cache, chunk, prompt, int(tokens == 1)))
        start += tokens
    torch.testing.assert_close(torch.cat(found), _expected(query, cache, prompt))


def test_rows_of_a_batch_are_cut_each_where_its_prompt_ends() -> None:
    lengths = torch.tensor([300], dtype=torch.int32)
    queries = [range(0, 50), range(90, 110), range(120, 130)]
    rows = StepRows(lengths, lengths, 4, dense_until=[10, 80, 100, 7], prefill_queries=queries)
    selector = _selector()
    plan = selector.plan(rows)
    assert plan.cuts is not None
    assert plan.cuts.rows.tolist() == [0, 1, 1, 2]
    assert plan.cuts.query_start_loc.tolist() == [0, 50, 60, 70, 80]
    assert plan.cuts.seq_lens.tolist() == [50, 100, 110, 130]
    rule, narrow = plan.layers[1].rule, [20, 40, 0, 0]
    assert rule is not None
    everything = [0, EVERYTHING_TOKENS, 0, 0]
    assert rule.values[:, 1, 0].tolist() == [narrow, everything, everything, narrow, narrow]
    # Where no part is narrowed, prefill has no rule, and a later step no trace of one.
    plan = selector.plan(
        StepRows(lengths, lengths, 2, dense_until=[10, 60], prefill_queries=[range(0, 60)])
    )
    assert plan.cuts is None
    assert plan.layers[1].is_prefill_plain
    assert plan.layers[1].prefill_rule(1, 1) is None
    again = selector.plan(rows).layers[1].rule
    assert again is not None
    assert again.values[:, 1, 0].tolist() == [narrow, everything, everything, narrow, narrow]


def test_reasons_name_requests_that_ask_for_everything() -> None:
    lengths = torch.tensor([500, 50, 500], dtype=torch.int32)
    rows = StepRows(lengths, lengths, 3, dense_until=[10, 10, EVERYTHING_TOKENS])
    assert _selector().plan(rows).reasons == [
        RowReason.SELECTED,
        RowReason.EVERYTHING_KEPT,
        RowReason.REQUEST_OFF,
    ]


def test_positions_of_prefill_queries_must_be_known() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="where the queries of prefill rows stand"):
        _selector().plan(StepRows(none, none, 1, dense_until=[7]))


def test_a_profile_says_which_layers_are_full_and_the_others_free(tmp_path: Path) -> None:
    geometry = Geometry(4, 2, 4, 64, 32, 8, 4096)
    path = write_profile(tmp_path / "p.json", 4, 2, [1, 3])
    config = FluxConfig(profile=path)
    schedule = METHOD.schedule(config, geometry)
    assert schedule.of_role(LayerRole.DENSE) == (1, 3)
    assert schedule.narrows_decode_only
    narrowed, kept = AfterPrompt(Span(SINK_TOKENS, WINDOW_TOKENS)), KeepAll(False)
    policies = (narrowed, kept, narrowed, kept)
    assert METHOD.entries(config, schedule, geometry) == tuple(
        KVEntry(layer, None, policy) for layer, policy in enumerate(policies)
    )
    keeping = FluxConfig(profile=path, retention="keep_all")
    assert {one.policy for one in METHOD.entries(keeping, schedule, geometry)} == {kept}


def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path) -> None:
    geometry = Geometry(4, 2, 4, 64, 32, 8, 4096)
    with pytest.raises(ConfigError, match="FLUX needs to know which layers read everything"):
        METHOD.schedule(FluxConfig(), geometry)
    path = write_profile(tmp_path / "p.json", 4, 2, [0], window_tokens=16)
    with pytest.raises(ConfigError, match="window_tokens of FLUX that is 16, less than one KV"):
        METHOD.schedule(FluxConfig(profile=path), geometry)
    with pytest.raises(ValueError, match=r"full_layers has \[4\]; layers are 0 to 3"):
        write_profile(tmp_path / "q.json", 4, 2, [4])


ROUTED = {
    "full_layers": [1],
    "routed_groups": [[0, 2], [3]],
    "sink_tokens": 40,
    "window_tokens": 128,
    "router_file": "router.safetensors",
    "router_sha256": "0" * 64,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_file": None}, "routed_groups need router_file"),
        ({"router_sha256": None}, "routed_groups need router_file"),
        ({"routed_groups": []}, "there are none; drop them"),
        ({"routed_groups": [[0, 2], [2]]}, r"layers \[2\] cannot be both in routed_groups\[0\]"),
        ({"routed_groups": [[0, 1]]}, r"layers \[1\] cannot be both in full_layers"),
        ({"routed_groups": [[0, 0]]}, r"routed_groups\[0\] names a layer twice"),
        ({"routed_groups": [[4]]}, r"routed_groups\[0\] has \[4\]; layers are 0 to 3"),
        ({"routed_groups": [[]]}, "at least 1 item"),
        ({"router_file": "../router.safetensors"}, "router_file"),
        ({"router_file": "router.pt"}, "router_file"),
        ({"evidence_tokens": 0}, "evidence_tokens"),
    ],
)
def test_routed_groups_that_cannot_be_served_are_refused(
    change: dict[str, object], message: str
) -> None:
    FluxSection.model_validate(ROUTED).require_shape(4, 2)
    with pytest.raises(ValueError, match=message):
        FluxSection.model_validate(ROUTED | change).require_shape(4, 2)
