"""Selections against a plain-Python reading of the method's definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_backends.config import MethodConfig
from attn_backends.method import Geometry
from attn_backends.methods.sink_window import SinkWindowConfig, SinkWindowSelector
from attn_backends.methods.sparse_full import FullSelector
from tests.batches import decode_batch

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
    selector = SinkWindowSelector(config, _geometry(block_size), CPU)
    selection = selector.select(decode_batch(seq_lens))
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
    selector = SinkWindowSelector(config, _geometry(32), CPU)
    selector.select(decode_batch([4000, 4000]))
    selection = selector.select(decode_batch([40]))
    assert selection.logical_blocks[0, 0].tolist()[:3] == [0, 1, -1]
    assert selection.counts[0].tolist() == [2, 2]


def test_reasons_tell_saved_rows_from_short_ones() -> None:
    config = SinkWindowConfig(sink_tokens=64, window_tokens=256)
    selector = SinkWindowSelector(config, _geometry(32), CPU)
    reasons = selector.row_reasons(torch.tensor([10, 320, 321, 4000]), {})
    kept, selected = ("sparse", "everything_kept"), ("sparse", "selected")
    assert reasons == [kept, kept, selected, selected]


def test_full_selects_every_block() -> None:
    selector = FullSelector(MethodConfig(), _geometry(32), CPU)
    selection = selector.select(decode_batch([1, 32, 33, 4096]))
    assert selection.counts[:, 0].tolist() == [1, 1, 2, 128]
    assert selection.logical_blocks[3, 1].tolist() == list(range(128))
    assert selection.logical_blocks[2, 0, :3].tolist() == [0, 1, -1]
