"""Random paged problems and the dense computation that judges them.

Everything that an op must not read is NaN: slots that were never written, blocks of
nobody, and (``poison_hidden``) tokens that no query may see. ``out`` starts as NaN too,
so that a row left out is noticed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from attn_backends.batch import BlockSelection, PagedBatch, SpanRule
from attn_backends.ops.cache_write.api import implementations as cache_write_implementations
from attn_backends.ops.dispatch import OpContext, OpImpl
from attn_backends.ops.triton_support import Launch
from kvcache.layout import KVOrder, PagedKVLayout, kv_views
from kvcache.spans import BETA_UNIT, Span

NUM_SPARE_BLOCKS = 3  # of nobody, NaN throughout
# Block size, head size and group: what the default suite has of all that kernels must serve.
DEFAULT_SIZES = {(16, 128, 4), (32, 64, 8), (64, 80, 1), (128, 256, 4)}


@dataclass(frozen=True)
class Problem:
    """One batch over a NaN-poisoned paged cache, and the raw keys and values behind it."""

    layout: PagedKVLayout
    keys: list[torch.Tensor]  # per row [seq_len, num_kv_heads, head_size]
    values: list[torch.Tensor]
    query: torch.Tensor  # [num_tokens, num_query_heads, head_size]
    out: torch.Tensor  # like query, NaN
    key_cache: torch.Tensor  # views, see kvcache.layout.kv_views
    value_cache: torch.Tensor
    batch: PagedBatch
    scale: float

    @property
    def device(self) -> torch.device:
        return self.query.device

    def query_range(self, row: int) -> slice:
        """Where the row's query tokens are in ``query`` and ``out``."""
        first, last = self.batch.query_start_loc[row : row + 2].tolist()
        return slice(first, last)

    def context(self, with_rule: bool) -> OpContext:
        """What an implementation must serve to serve this problem."""
        num_query_heads = self.query.shape[1]
        return OpContext(self.layout, num_query_heads, self.device.type, with_rule)


def device_of(impl: OpImpl) -> str:
    """Where an implementation is tested: Triton on the GPU if its interpreter is off."""
    on_gpu = impl.name == "triton" and os.environ["TRITON_INTERPRET"] != "1"
    return "cuda" if on_gpu else "cpu"


def is_interpreted(impl: OpImpl) -> bool:
    """Whether an implementation is tested in Triton's slow interpreter."""
    return impl.name == "triton" and device_of(impl) == "cpu"


def cases_and_orders(
    implementations: Sequence[OpImpl], cases: Sequence[Any]
) -> pytest.MarkDecorator:
    """``impl``, ``case`` and ``order``; by default Triton serves the order it has on a GPU."""
    params = []
    for impl, case, order in itertools.product(implementations, cases, KVOrder):
        is_odd = impl.name == "triton" and order is not KVOrder.FUSED and case is not cases[0]
        params.append(
            pytest.param(
                impl,
                case.values[0],
                order,
                id=f"{impl.name}-{case.id}-{order.value}",
                marks=[pytest.mark.slow] if is_odd else [],
            )
        )
    return pytest.mark.parametrize(("impl", "case", "order"), params)


def sizes() -> pytest.MarkDecorator:
    """``case`` for ``make_problem``: every block size, head size and group, dtypes in turn."""
    dtypes = itertools.cycle((torch.bfloat16, torch.float32, torch.float16))
    params = []
    for size in itertools.product((16, 32, 64, 128), (64, 80, 128, 256), (1, 4, 8)):
        block_size, head_size, group = size
        case = {
            "block_size": block_size,
            "head_size": head_size,
            "num_q_heads": group,
            "num_kv_heads": 1,
            "dtype": next(dtypes),
        }
        marks = [] if size in DEFAULT_SIZES else [pytest.mark.slow]
        name = f"block{block_size}-size{head_size}-gqa{group}"
        params.append(pytest.param(case, id=name, marks=marks))
    return pytest.mark.parametrize("case", params)


def skip_unless_supported(impl: OpImpl, context: OpContext) -> None:
    """Skips with the implementation's own reason; Triton has no excuse here.

    Raises:
        AssertionError: Triton refuses a problem of the test matrix.
    """
    reason = impl.unsupported_reason(context)
    assert impl.name != "triton" or reason is None, f"triton must serve this: {reason}"
    if reason is not None:
        pytest.skip(f"{impl.name}: {reason}")


def make_problem(
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 32,
    dtype: torch.dtype = torch.float32,
    order: KVOrder = KVOrder.FUSED,
    seed: int = 0,
    device: str = "cpu",
) -> Problem:
    """Random rows, written through a shuffled block table into a cache full of NaN."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    keys = [random(seq_len, num_kv_heads, head_size) for seq_len in seq_lens]
    values = [random(seq_len, num_kv_heads, head_size) for seq_len in seq_lens]
    query = random(sum(query_lens), num_q_heads, head_size)
    blocks_per_row = [-(-seq_len // block_size) for seq_len in seq_lens]
    num_blocks = sum(blocks_per_row) + NUM_SPARE_BLOCKS
    layout = PagedKVLayout(num_blocks, block_size, num_kv_heads, head_size, dtype, order)
    shuffled = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    block_table = torch.zeros(len(seq_lens), max(blocks_per_row), dtype=torch.int32)
    for row, row_blocks in enumerate(torch.split(shuffled[:-NUM_SPARE_BLOCKS], blocks_per_row)):
        block_table[row, : len(row_blocks)] = row_blocks
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    batch = PagedBatch(
        query_start_loc=starts.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_table=block_table.to(device),
        num_reqs=len(seq_lens),
        num_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    key_cache, value_cache = kv_views(
        torch.full(layout.shape, torch.nan, dtype=dtype, device=device), order
    )
    write = {impl.name: impl for impl in cache_write_implementations()}["reference"].run
    slots = [slots_of(block_table[row], n, block_size) for row, n in enumerate(seq_lens)]
    write(
        torch.cat(keys).to(device),
        torch.cat(values).to(device),
        key_cache,
        value_cache,
        torch.cat(slots).to(device),
    )
    query = query.to(device)
    return Problem(
        layout=layout,
        keys=keys,
        values=values,
        query=query,
        out=torch.full_like(query, torch.nan),
        key_cache=key_cache,
        value_cache=value_cache,
        batch=batch,
        scale=head_size**-0.5,
    )


def slots_of(row_blocks: torch.Tensor, seq_len: int, block_size: int) -> torch.Tensor:
    """Slots of a row's tokens, ``[seq_len]`` int64."""
    tokens = torch.arange(seq_len)
    return row_blocks.cpu().long()[tokens // block_size] * block_size + tokens % block_size


def single_row(problem: Problem, row: int) -> Problem:
    """One row of a problem as a problem of its own, over the same cache."""
    tokens = problem.query_range(row)
    return replace(
        problem,
        keys=problem.keys[row : row + 1],
        values=problem.values[row : row + 1],
        query=problem.query[tokens],
        out=torch.full_like(problem.query[tokens], torch.nan),
        batch=problem.batch.rows(row, row + 1, tokens.start, tokens.stop),
    )


def make_rule(
    problem: Problem, span: Span, per_head: bool = False, per_query_head: bool = False
) -> SpanRule:
    """A rule for all rows, or another one for every (row, KV head) or (row, query head)."""
    num_kv_heads, device = problem.layout.num_kv_heads, problem.device
    if not per_head and not per_query_head:
        return SpanRule.of([span] * num_kv_heads, problem.batch.num_reqs, device)
    num_spans = problem.query.shape[1] // num_kv_heads if per_query_head else 1
    steps = range(problem.batch.num_reqs * num_kv_heads * num_spans)
    varied = [
        replace(
            span,
            sink_tokens=span.sink_tokens + 5 * step,
            floor_tokens=span.floor_tokens + 7 * step,
            beta_64ths=(span.beta_64ths * (step + 1)) % (BETA_UNIT + 1),
        )
        for step in steps
    ]
    values = SpanRule.of(varied, 1, device).values
    return SpanRule(values.view(problem.batch.num_reqs, num_kv_heads, num_spans, -1))


def full_selection(problem: Problem) -> BlockSelection:
    """Every block of every row."""
    return _selection(problem, lambda row, num_blocks: torch.arange(num_blocks))


def random_selection(problem: Problem, seed: int = 0) -> BlockSelection:
    """About half of the blocks, other ones for each KV head, always the last one."""
    generator = torch.Generator().manual_seed(seed)

    def choose(row: int, num_blocks: int) -> torch.Tensor:
        chosen = torch.rand(num_blocks, generator=generator) < 0.5
        chosen[-1] = True
        return chosen.nonzero().flatten()

    return _selection(problem, choose)


def _selection(problem: Problem, choose) -> BlockSelection:  # type: ignore[no-untyped-def]
    num_reqs, num_kv_heads = problem.batch.num_reqs, problem.layout.num_kv_heads
    # One column more than can be used: padding must be harmless.
    width = problem.batch.block_table.shape[1] + 1
    blocks = torch.full((num_reqs, num_kv_heads, width), -1, dtype=torch.int32)
    counts = torch.zeros((num_reqs, num_kv_heads), dtype=torch.int32)
    for row in range(num_reqs):
        num_blocks = -(-len(problem.keys[row]) // problem.layout.block_size)
        for head in range(num_kv_heads):
            chosen = choose(row, num_blocks)
            blocks[row, head, : len(chosen)] = chosen
            counts[row, head] = len(chosen)
    return BlockSelection(blocks.to(problem.device), counts.to(problem.device))


def sink_window_selection(
    problem: Problem, sink_tokens: int, window_tokens: int
) -> tuple[BlockSelection, SpanRule]:
    """Selection and rule of the SINK_WINDOW method."""
    pytest.importorskip("pydantic")  # a bare GPU machine has none, and all else needs none
    from attn_backends.method import Geometry, StepRows
    from attn_backends.plan import LayerRole, LayerSchedule, Selected
    from attn_backends.windows import WindowSelector

    geometry = Geometry(
        num_layers=1,
        num_kv_heads=problem.layout.num_kv_heads,
        num_query_heads=problem.query.shape[1],
        head_size=problem.layout.head_size,
        block_size=problem.layout.block_size,
        max_num_reqs=problem.batch.num_reqs,
        max_model_len=problem.batch.max_seq_len,
    )
    spans = (Span(sink_tokens, window_tokens),) * geometry.num_kv_heads
    schedule = LayerSchedule((LayerRole.WINDOW,), spans={0: spans})
    selector = WindowSelector(schedule, geometry, problem.device)
    rows = StepRows(problem.batch.seq_lens, None, problem.batch.num_reqs)
    plan = selector.plan(rows).layers[0]
    assert isinstance(plan.decode, Selected)
    assert plan.rule is not None
    return plan.decode.selection, plan.rule


def visible_tokens(
    problem: Problem, row: int, rule: SpanRule | None, selection: BlockSelection | None = None
) -> torch.Tensor:
    """What each query of a row may see, ``[num_kv_heads, num_spans, query_len, seq_len]`` bool."""
    seq_len, tokens = len(problem.keys[row]), problem.query_range(row)
    query_len = tokens.stop - tokens.start
    token = torch.arange(seq_len)
    position = torch.arange(seq_len - query_len, seq_len)[:, None]
    num_kv_heads, num_spans = problem.layout.num_kv_heads, 1
    if rule is not None:
        num_spans = rule.values.shape[2]
    visible = torch.zeros(num_kv_heads, num_spans, query_len, seq_len, dtype=torch.bool)
    for head, place in itertools.product(range(num_kv_heads), range(num_spans)):
        seen = token <= position
        if rule is not None:
            span = Span(*rule.values[row, head, place].tolist())
            firsts = [span.first_seen(p + 1) for p in position.flatten().tolist()]
            seen = seen & ((token < span.sink_tokens) | (token >= torch.tensor(firsts)[:, None]))
        if selection is not None:
            count = int(selection.counts[row, head])
            chosen = selection.logical_blocks[row, head, :count].cpu()
            seen = seen & torch.isin(token // problem.layout.block_size, chosen)
        visible[head, place] = seen
    return visible


def poison_hidden(
    problem: Problem, rule: SpanRule | None, selection: BlockSelection | None = None
) -> None:
    """Overwrites tokens that no query may see with NaN, in the cache only."""
    for row, keys in enumerate(problem.keys):
        seen = visible_tokens(problem, row, rule, selection).flatten(1, 2).any(dim=1)  # by KV head
        slots = slots_of(problem.batch.block_table[row], len(keys), problem.layout.block_size)
        for head, seen_by_head in enumerate(seen):
            hidden = slots[~seen_by_head].to(problem.device)
            block, offset = hidden // problem.layout.block_size, hidden % problem.layout.block_size
            problem.key_cache[block, head, offset] = torch.nan
            problem.value_cache[block, head, offset] = torch.nan


def dense_attention(
    problem: Problem,
    rule: SpanRule | None,
    dtype: torch.dtype,
    selection: BlockSelection | None = None,
) -> torch.Tensor:
    """Attention from the raw keys and values, every step in ``dtype``; knows no cache.

    Returns:
        ``[num_tokens, num_query_heads, head_size]`` on the CPU.
    """
    group = problem.query.shape[1] // problem.layout.num_kv_heads
    out = torch.empty(problem.query.shape, dtype=dtype)
    for row in range(problem.batch.num_reqs):
        tokens = problem.query_range(row)
        query = problem.query[tokens].cpu().to(dtype).transpose(0, 1)  # [heads, query_len, size]
        keys, values = (
            raw[row].to(dtype).transpose(0, 1).repeat_interleave(group, dim=0)
            for raw in (problem.keys, problem.values)
        )
        visible = visible_tokens(problem, row, rule, selection)
        visible = visible.expand(-1, group, -1, -1).flatten(0, 1)
        logits = query @ keys.transpose(1, 2) * problem.scale
        weights = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        out[tokens] = (weights @ values).transpose(0, 1)
    return out


def launched_grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Filled with the grid of every launch from now on."""
    grids: list[tuple[int, ...]] = []
    start = Launch.start

    def noted(launch: Launch, kernels: Any) -> None:
        grids.append(launch.grid)
        start(launch, kernels)

    monkeypatch.setattr(Launch, "start", noted)
    return grids
