"""``reselect_steps`` in the builder and at start: which rows are due, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from attn_backends.adapter.metadata import ExtMetadataBuilder
from attn_backends.adapter.requests import BOOK
from attn_backends.batch import PagedBatch, RowOptions
from attn_backends.config import ConfigError, EngineFacts
from attn_backends.method import Geometry
from attn_backends.methods.tidal_decode import METHOD, TidalConfig
from tests.batches import decode_batch

ROWS, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, BLOCKS = 3, 2, 4, 32, 32, 12
LAYER = "anchor"
CPU = torch.device("cpu")


def _batch(seq_lens: list[int]) -> PagedBatch:
    table = torch.arange(ROWS * BLOCKS, dtype=torch.int32).view(ROWS, BLOCKS)
    return decode_batch(seq_lens, table)


def test_the_builder_tells_due_rows_by_request(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry(3, KV_HEADS, QUERY_HEADS, HEAD, BLOCK, ROWS, BLOCKS * BLOCK)
    config = TidalConfig(reselect_steps=8, min_context_tokens=0, recall_floor=0.5)
    builder: Any = object.__new__(ExtMetadataBuilder)
    builder._counters, builder._ended = None, BOOK.ended_requests()
    builder._selector = METHOD.make_selector(config, geometry, CPU)
    builder._selector.keeper.add_layer(LAYER)
    ids = ["a", "b", "c"]
    monkeypatch.setattr(BOOK, "row_ids", lambda: ids)

    def step(seq_lens: list[int], options: dict[int, RowOptions]) -> tuple[list[int], list[str]]:
        """Rows that select anew, and whose kept selection each row reads."""
        monkeypatch.setattr(BOOK, "step", BOOK.step + 1)
        builder._options(len(ids))
        reasons = builder._selector.row_reasons(torch.tensor(seq_lens), options)
        due, slots = builder._due(seq_lens, reasons, options)
        kept = builder._kept(_batch(seq_lens), due, slots)
        assert kept.stores is builder._selector.keeper.stores
        assert (kept.due.rows.tolist() if kept.due else []) == due
        return due, [by_slot.setdefault(slot, ids[row]) for row, slot in enumerate(slots)]

    by_slot: dict[int, str] = {}
    assert step([340, 200, 300], {}) == ([0, 1, 2], ids)
    assert step([341, 201, 301], {}) == ([1], ids)
    ids.reverse()
    assert step([302, 202, 342], {1: RowOptions(budget_tokens=256)}) == ([1], ids)
    # Guard checks see selections of every age.
    assert builder._selector.watch._interval_steps == 65


def test_intervals_that_cannot_be_honoured_are_refused() -> None:
    with pytest.raises(ConfigError, match="reselect_steps is 0; it must be between 1"):
        TidalConfig(reselect_steps=0)
    with pytest.raises(ConfigError, match=r"reselect_steps is 4, but anchors .* to selected"):
        TidalConfig(reselect_steps=4, anchor_attention="full")
    with pytest.raises(ConfigError, match=r"reselect_steps is 5, .* 1, 2, 4, 8, 16, 32"):
        TidalConfig(reselect_steps=5).check(EngineFacts("cpu", 32, 1))
    TidalConfig(reselect_steps=32).check(EngineFacts("cpu", 64, 1))
    with pytest.raises(ConfigError, match="reselect_steps is 4, but on GPUs"):
        TidalConfig(reselect_steps=4).check(EngineFacts("cuda", 32, 1))
    TidalConfig(reselect_steps=4).check(EngineFacts("cpu", 32, 2))
