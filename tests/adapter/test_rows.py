"""Rows as vLLM's own functions order, pad and flag them: who decodes, who is counted, who has what.

On GPUs runner V2 orders rows by their tokens, pads what it replays as a graph and flags only the
rows that are there; runner V1 flags padding as well. Nothing here needs a GPU.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import reorder_batch_to_split_decodes_and_prefills
from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import get_uniform_decode_token_count

from attn_backends.adapter.entries import SplitEngine
from attn_backends.adapter.planning import StepPlanner
from attn_backends.adapter.requests import BOOK
from attn_backends.adapter.rows import (
    is_prefilling,
    kinds_by_order,
    kinds_by_tokens,
    query_positions,
)
from attn_backends.adapter.worker import row_ids_of
from attn_backends.batch import RowOptions
from attn_backends.budget import BudgetSelector
from attn_backends.budget_config import BudgetConfig
from attn_backends.method import Geometry
from attn_backends.plan import LayerRole, LayerSchedule
from tests.batches import anchor_state

BLOCK, MAX_MODEL_LEN, MAX_REQS = 32, 4096, 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Request:
    """A request in a step, tokens."""

    name: str
    prompt: int
    computed: int
    scheduled: int

    @property
    def is_prefilling(self) -> bool:
        return self.computed < self.prompt


def _common(rows: list[_Request], padded: int = 0, flags_padding: bool = False) -> Any:
    """vLLM's metadata of these rows, and of as many more as pad a graph.

    Args:
        rows: in the batch's order.
        padded: rows of the graph; 0: none is replayed.
        flags_padding: as V1 does.
    """
    num_rows = padded or len(rows)
    rest = num_rows - len(rows)
    query_lens = [row.scheduled for row in rows] + [0] * rest
    starts = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
    lengths = [row.computed + row.scheduled for row in rows] + [0] * rest
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    flags = [row.is_prefilling for row in rows] + [False] * (rest if flags_padding else 0)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=num_rows,
        num_actual_tokens=padded or sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(lengths),
        block_table_tensor=torch.zeros(num_rows, 4, dtype=torch.int32),
        slot_mapping=torch.zeros(num_rows, dtype=torch.int64),
        is_prefilling=torch.tensor(flags),
    )


DECODE = _Request("decode", 2000, 2000, 1)
LAST_PROMPT_TOKEN = _Request("last prompt token", 1500, 1499, 1)
ONE_TOKEN_PROMPT = _Request("one-token prompt", 1, 0, 1)
CHUNK = _Request("chunk", 3000, 1024, 512)
FIRST_CHUNK = _Request("first chunk", 3000, 0, 2)


def _v2_order(rows: list[_Request]) -> list[_Request]:
    by_name = {row.name: row for row in rows}
    tokens = {row.name: row.scheduled for row in rows}
    return [by_name[name] for name in sort_batch_req_ids(tokens, {}, decode_query_len=1)]


def _v1_order(rows: list[_Request]) -> list[_Request]:
    order = list(range(len(rows)))

    def swap(first: int, second: int) -> None:
        order[first], order[second] = order[second], order[first]
        for array in (batch.num_computed_tokens_cpu, batch.num_prompt_tokens):
            array[[first, second]] = array[[second, first]]

    batch: Any = SimpleNamespace(
        req_ids=[row.name for row in rows],
        num_computed_tokens_cpu=np.array([row.computed for row in rows]),
        num_prompt_tokens=np.array([row.prompt for row in rows]),
        swap_states=swap,
    )
    step: Any = SimpleNamespace(num_scheduled_tokens={row.name: row.scheduled for row in rows})
    reorder_batch_to_split_decodes_and_prefills(batch, step, decode_threshold=1)
    return [rows[place] for place in order]


@pytest.mark.parametrize("order", [_v1_order, _v2_order])
@pytest.mark.parametrize("seed", range(20))
def test_decode_rows_are_found_in_either_runners_order(order: Any, seed: int) -> None:
    generator = random.Random(seed)
    kinds = [DECODE, LAST_PROMPT_TOKEN, ONE_TOKEN_PROMPT, CHUNK, FIRST_CHUNK]
    chosen = generator.choices(kinds, k=generator.randint(1, 8))
    named = [
        _Request(f"{number}", one.prompt, one.computed, one.scheduled)
        for number, one in enumerate(chosen)
    ]
    rows = order(named)
    found = kinds_by_tokens(_common(rows))
    decodes = {row for row, one in enumerate(rows) if not one.is_prefilling}
    assert {*range(found.num_decodes)} - {*found.prompt_rows} == decodes
    assert all(rows[row].scheduled == 1 for row in range(found.num_decodes))
    assert all(rows[row].is_prefilling for row in found.prompt_rows)


def test_a_prompt_token_in_front_of_decode_rows_hides_none_of_them() -> None:
    rows = _v2_order([LAST_PROMPT_TOKEN, DECODE, _Request("other", 9, 40, 1), CHUNK])
    common = _common(rows)
    assert kinds_by_order(common).num_decodes == 0  # what V1's order would need
    found = kinds_by_tokens(common)
    assert (found.num_decodes, found.prompt_rows) == (3, (0,))


@pytest.mark.parametrize("flags_padding", [True, False])
def test_a_padded_graph_is_all_decode_rows(flags_padding: bool) -> None:
    rows = [DECODE, LAST_PROMPT_TOKEN, _Request("other", 9, 40, 1)]
    # vLLM replays a decode graph for these, the prompt's last token among them.
    assert get_uniform_decode_token_count(3, 3, 1, decode_graph_eligible=True) == 1
    common = _common(rows, padded=8, flags_padding=flags_padding)
    found = kinds_by_tokens(common)
    assert (found.num_decodes, found.prompt_rows) == (8, (1,))
    assert is_prefilling(common).tolist() == [False, True] + [False] * 6


def test_decode_rows_out_of_order_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"decode rows behind rows .*\[512, 1\] query tokens"):
        kinds_by_tokens(_common([CHUNK, DECODE]))
    # A prompt of one token may stand there: it is prefill, and served as such.
    assert kinds_by_tokens(_common([DECODE, CHUNK, ONE_TOKEN_PROMPT])).num_decodes == 1


def test_query_positions_are_those_of_each_rows_last_tokens() -> None:
    starts, lengths = torch.tensor([0, 1, 6, 6]), torch.tensor([40, 5, 9])
    assert query_positions(starts, lengths) == [range(39, 40), range(0, 5), range(9, 9)]


class _Counters:
    """Collects what is counted."""

    def __init__(self) -> None:
        self.rows: Counter[tuple[str, str]] = Counter()

    def add(self, rows: Counter[tuple[str, str]]) -> None:
        self.rows += rows

    def show_recall(self, watch: Any) -> None:
        """Not looked at."""


class _Engine:
    """A planner under TIDAL_DECODE's rules, asked as a builder asks."""

    def __init__(self) -> None:
        geometry = Geometry(2, 2, 4, 64, BLOCK, MAX_REQS, MAX_MODEL_LEN)
        schedule = LayerSchedule((LayerRole.SELF, LayerRole.REUSE))
        self.counters: Any = _Counters()
        self.planner = StepPlanner(
            BudgetSelector(BudgetConfig(), schedule, geometry, CPU),
            schedule,
            self.counters,
            SplitEngine(geometry, 64),
        )

    def step(self, common: Any, places: Any = None) -> tuple[list[int], list[int]]:
        """Budgets and scored tokens of the decode rows."""
        found = kinds_by_tokens(common)
        lengths = common.seq_lens[: found.num_decodes]
        plan = self.planner.plan(
            "a builder", lengths, lengths, common.num_reqs, found.prompt_rows, places
        )
        state = anchor_state(plan)
        return state.budget_blocks.tolist(), state.scored_lens.tolist()


EVERYTHING = MAX_MODEL_LEN // BLOCK


def test_prompt_tokens_in_a_decode_graph_read_everything_and_count_as_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = _Engine()
    monkeypatch.setattr(BOOK, "num_rows", 3)
    rows = [LAST_PROMPT_TOKEN, DECODE, _Request("short", 9, 40, 1)]
    budgets, scored = engine.step(_common(rows, padded=8))
    assert budgets == [EVERYTHING, 16, *[EVERYTHING] * 6]
    assert scored == [1, 2001, 1, 0, 0, 0, 0, 0]
    assert engine.counters.rows == {("sparse", "selected"): 1, ("dense", "short_context"): 1}


def test_batches_that_vllm_made_up_are_not_counted() -> None:
    """As it compiles, captures graphs, and runs beside data-parallel engines that have work."""
    engine = _Engine()
    for num_rows in (1, MAX_REQS):
        engine.step(_common([_Request(f"{n}", 0, 0, 1) for n in range(num_rows)]))
    assert not engine.counters.rows


def test_options_find_their_rows_in_either_runners_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _Engine()
    monkeypatch.setattr(BOOK, "_by_id", {"wide": RowOptions(budget_tokens=1024)})
    monkeypatch.setattr(BOOK, "num_rows", 3)
    wide = _Request("wide", 1800, 1900, 1)
    # Runner V2 keeps requests in slots, and tells each row's.
    states: Any = RequestState.__new__(RequestState)
    states.index_to_req_id = {5: "wide", 0: "decode", 3: "last prompt token"}
    monkeypatch.setattr(BOOK, "row_ids", row_ids_of(SimpleNamespace(req_states=states)))
    rows = _v2_order([LAST_PROMPT_TOKEN, wide, DECODE])
    slots = {name: slot for slot, name in states.index_to_req_id.items()}
    places = np.array([slots[row.name] for row in rows])
    budgets, _ = engine.step(_common(rows, padded=4), places)
    assert budgets == [EVERYTHING, 32, 16, EVERYTHING]
    # Runner V1 keeps them in the batch's order.
    rows = _v1_order([LAST_PROMPT_TOKEN, wide, DECODE])
    batch = SimpleNamespace(req_ids=[row.name for row in rows])
    monkeypatch.setattr(BOOK, "row_ids", row_ids_of(SimpleNamespace(input_batch=batch)))
    budgets, _ = engine.step(_common(rows, padded=4, flags_padding=True))
    assert [row.name for row in rows][2] == "last prompt token"
    assert budgets == [*(32 if row is wide else 16 for row in rows[:2]), EVERYTHING, EVERYTHING]
