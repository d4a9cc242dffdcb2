"""Selections against a plain-Python reading of the method's definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_backends.batch import BlockSelection
from attn_backends.config import MethodConfig, parse_config
from attn_backends.method import Geometry, Selector, SparseMethod
from attn_backends.methods import REGISTRY, load_method
from attn_backends.methods.sink_window import METHOD as SINK_WINDOW
from attn_backends.methods.sink_window import SinkWindowConfig
from attn_backends.methods.sparse_full import METHOD as SPARSE_FULL
from attn_backends.plan import LayerRole, LayerSchedule, Selected
from attn_backends.windows import WindowSelector
from kvcache.spans import Span
from tests.batches import labels, step_rows
from tests.profiles import write_profile

CPU = torch.device("cpu")


def _geometry(block_size: int) -> Geometry:
    return Geometry(
        num_layers=2,
        num_kv_heads=2,
        num_query_heads=4,
        head_size=64,
        block_size=block_size,
        max_num_reqs=8,
        max_model_len=4096,
    )


def _selector(method: SparseMethod, config: MethodConfig, block_size: int = 32) -> Selector:
    geometry = _geometry(block_size)
    return method.make_selector(config, method.schedule(config, geometry), geometry, CPU)


def _selection(selector: Selector, seq_lens: list[int]) -> BlockSelection:
    way = selector.plan(step_rows(seq_lens)).layers[1].decode
    assert isinstance(way, Selected)
    return way.selection


@settings(max_examples=200, deadline=None)
@given(
    seq_lens=st.lists(st.integers(1, 4096), min_size=1, max_size=8),
    sink_tokens=st.integers(0, 300),
    window_tokens=st.integers(32, 1500),
    block_size=st.sampled_from([16, 32]),
)
def test_sink_window_selects_exactly_the_blocks_with_visible_tokens(
    seq_lens: list[int], sink_tokens: int, window_tokens: int, block_size: int
) -> None:
    config = SinkWindowConfig(sink_tokens=sink_tokens, window_tokens=window_tokens)
    selection = _selection(_selector(SINK_WINDOW, config, block_size), seq_lens)
    for row, seq_len in enumerate(seq_lens):
        last = seq_len - 1
        tokens = [t for t in range(seq_len) if t < sink_tokens or t > last - window_tokens]
        # Not one block more than those with a visible token.
        expected = sorted({t // block_size for t in tokens})
        for head in range(2):
            count = int(selection.counts[row, head])
            blocks = selection.logical_blocks[row, head].tolist()
            assert blocks[:count] == expected
            assert set(blocks[count:]) <= {-1}


def test_a_short_row_after_a_long_one_leaves_no_trace() -> None:
    config = SinkWindowConfig(sink_tokens=64, window_tokens=256)
    selector = _selector(SINK_WINDOW, config)
    _selection(selector, [4000, 4000])
    selection = _selection(selector, [40])
    assert selection.logical_blocks[0, 0].tolist()[:3] == [0, 1, -1]
    assert selection.counts[0].tolist() == [2, 2]


def test_reasons_tell_saved_rows_from_short_ones() -> None:
    config = SinkWindowConfig(sink_tokens=64, window_tokens=256)
    plan = _selector(SINK_WINDOW, config).plan(step_rows([10, 320, 321, 4000]))
    kept, selected = ("sparse", "everything_kept"), ("sparse", "selected")
    assert labels(plan) == [kept, kept, selected, selected]


def test_full_selects_every_block() -> None:
    selection = _selection(_selector(SPARSE_FULL, MethodConfig()), [1, 32, 33, 4096])
    assert selection.counts[:, 0].tolist() == [1, 1, 2, 128]
    assert selection.logical_blocks[3, 1].tolist() == list(range(128))
    assert selection.logical_blocks[2, 0, :3].tolist() == [0, 1, -1]


@settings(max_examples=100, deadline=None)
@given(
    seq_lens=st.lists(st.integers(1, 4096), min_size=1, max_size=8),
    spans=st.tuples(
        *[
            st.builds(
                Span,
                st.integers(0, 200),
                st.integers(32, 600),
                st.integers(-1024, 1024),
                st.integers(0, 64),
            )
        ]
        * 2
    ),
)
def test_heads_read_what_their_own_span_shows(
    seq_lens: list[int], spans: tuple[Span, Span]
) -> None:
    schedule = LayerSchedule((LayerRole.DENSE, LayerRole.WINDOW), spans={1: spans})
    selection = _selection(WindowSelector(schedule, _geometry(32), CPU), seq_lens)
    for row, seq_len in enumerate(seq_lens):
        for head, span in enumerate(spans):
            first = span.first_seen(seq_len)
            seen = [t for t in range(seq_len) if t < span.sink_tokens or t >= first]
            count = int(selection.counts[row, head])
            blocks = selection.logical_blocks[row, head].tolist()
            assert blocks[:count] == sorted({t // 32 for t in seen})
            assert set(blocks[count:]) <= {-1}


def test_rules_cover_prefill_rows_too() -> None:
    spans = (Span(32, 256), Span(0, 64))
    schedule = LayerSchedule((LayerRole.WINDOW,) * 2, spans={0: spans, 1: spans})
    selector = WindowSelector(schedule, _geometry(32), CPU)
    plan = selector.plan(step_rows([500], num_prefills=2))
    assert plan.layers[0] is plan.layers[1]
    rule = plan.layers[0].rule
    assert rule is not None
    assert rule.values.tolist() == [[[[32, 256, 0, 0]], [[0, 64, 0, 0]]]] * 3


@pytest.mark.parametrize("name", REGISTRY)
def test_what_is_computed_from_sparse_rows_serves_no_later_prompt(
    name: str, tmp_path: Path
) -> None:
    """Where prefill reads everything that decode leaves out."""
    method, geometry = load_method(name), Geometry(6, 2, 4, 32, 32, 8, 2048)
    profile = write_profile(tmp_path / "profile.json") if method.needs_profile else None
    config = parse_config(method.config_cls, {"profile": profile} if profile else {}, name)
    schedule = method.schedule(config, geometry)
    policies = [entry.policy for entry in method.entries(config, schedule, geometry)]
    assert policies
    if schedule.narrows_decode_only:
        assert not any(policy.caches_generated for policy in policies)
