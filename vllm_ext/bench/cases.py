"""The ops as ``vllm-ext bench kernel`` runs them: arguments, results and their judgement."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_backends.batch import BlockSelection, PagedBatch
from attn_backends.ops.anchor_decode import api as anchor_decode
from attn_backends.ops.block_topk import api as block_topk
from attn_backends.ops.cache_write import api as cache_write
from attn_backends.ops.dense_decode import api as dense_decode
from attn_backends.ops.dispatch import OpImpl
from attn_backends.ops.paged_attention import api as paged_attention
from attn_backends.ops.sparse_decode import api as sparse_decode
from kvcache.layout import PagedKVLayout, kv_views
from vllm_ext.bench.workloads import Problem, attention_bound, eager_attention, mass_bound

OPS: dict[str, Callable[[], list[OpImpl]]] = {
    "sparse_decode": sparse_decode.implementations,
    "anchor_decode": anchor_decode.implementations,
    "dense_decode": dense_decode.implementations,
    "block_topk": block_topk.implementations,
    "paged_attention": paged_attention.implementations,
    "cache_write": cache_write.implementations,
}
# Names of cases; the others are called like their op.
ANCHOR, DENSE_DECODE = "anchor", "dense decode"  # anchor_decode with masses, dense_decode
SCORES = "anchor, masses only"  # without output
DECODE_ATTENTION = "paged_attention, decode rows"  # of a mixed batch: for baselines only

SINK_TOKENS, RECENT_TOKENS = 32, 64  # TIDAL_DECODE's defaults

Expected = tuple[torch.Tensor, torch.Tensor | None]  # result, how far off (None: bit for bit)


@dataclass(frozen=True)
class Case:
    """One op on one problem, ready to be called by any implementation.

    ``calls`` are arguments of ``run``, one tuple per copy of the cache. ``results`` are the
    tensors that the first call writes, ``reference_results`` those of ``reference_call``,
    where attention is not rounded to the cache's dtype. ``bounds`` gives, from the
    reference's results, how far each result may be off; None means bit for bit.
    """

    name: str
    op: str
    baseline: str  # name of the case that dense baselines serve for the same rows
    read_bytes: int  # keys and values (block_topk: masses) that the op has to read
    calls: tuple[tuple[Any, ...], ...]
    results: tuple[torch.Tensor, ...]
    reference_call: tuple[Any, ...]
    reference_results: tuple[torch.Tensor, ...]
    bounds: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]] | None
    prefill_flops: int = 0  # of attention with rows of more than one query token: what bounds it

    @property
    def is_baseline(self) -> bool:
        """Whether dense baselines serve this case."""
        return self.name == self.baseline


def make_cases(problem: Problem, ops: Sequence[str], budget_tokens: int) -> list[Case]:
    """The cases of ``ops``, and those that their baselines need.

    Decode ops have no case in a batch without decode rows.
    """
    batch, decode = problem.batch, problem.decode
    cases = []
    if decode is not None:
        is_mixed = decode.num_reqs < batch.num_reqs
        baseline = DECODE_ATTENTION if is_mixed else "paged_attention"
        topk, selection = _topk_case(problem, decode, baseline, budget_tokens)
        mass = torch.empty(selection.logical_blocks.shape, device=problem.query.device)
        attention = functools.partial(_attention_case, problem, decode, baseline)
        cases = [
            attention("sparse_decode", "sparse_decode", middle=(selection, None)),
            attention(ANCHOR, "anchor_decode", masses=(mass,)),
            attention(DENSE_DECODE, "dense_decode"),
            _scores_case(problem, decode, baseline, mass),
            topk,
        ]
    if "cache_write" in ops:  # only where asked for: it has two caches of its own
        cases.append(_write_case(problem))
    cases = [case for case in cases if case.op in ops]
    baselines = {case.baseline for case in cases}
    if "paged_attention" in ops or "paged_attention" in baselines:
        name = "paged_attention"
        cases.append(_attention_case(problem, batch, name, name, name, middle=(None,)))
    if decode is not None and DECODE_ATTENTION in baselines:
        name = DECODE_ATTENTION
        cases.append(
            _attention_case(problem, decode, name, name, "paged_attention", middle=(None,))
        )
    return cases


def _attention_case(
    problem: Problem,
    batch: PagedBatch,
    baseline: str,
    name: str,
    op: str,
    middle: tuple[Any, ...] = (),
    masses: tuple[torch.Tensor, ...] = (),
) -> Case:
    """An attention op; its arguments are ``..., batch, *middle, scale, out, *masses``."""
    query, scale = problem.query[: batch.num_tokens], problem.layout.head_size**-0.5
    out, exact = torch.empty_like(query), torch.empty_like(query, dtype=torch.float32)
    exact_masses = tuple(mass.clone() for mass in masses)
    views = problem.views
    selection = middle[0] if op == "sparse_decode" else None

    def bounds(expected: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        eager = eager_attention(query, *views[0], batch, scale, selection)
        num_terms = batch.max_seq_len
        found = [attention_bound(expected[0], eager, num_terms)]
        found += [mass * _mass_bound(problem, batch) for mass in expected[1:]]
        return found

    return Case(
        name=name,
        op=op,
        baseline=baseline,
        read_bytes=_attention_bytes(problem.layout, batch, selection),
        calls=tuple((query, *pair, batch, *middle, scale, out, *masses) for pair in views),
        results=(out, *masses),
        reference_call=(query, *views[0], batch, *middle, scale, exact, *exact_masses),
        reference_results=(exact, *exact_masses),
        bounds=bounds,
        prefill_flops=_flops(query, batch) if batch.max_query_len > 1 else 0,
    )


def _flops(query: torch.Tensor, batch: PagedBatch) -> int:
    """Two matrix products over what each query sees; a sum or product is one operation."""
    query_lens = batch.query_start_loc.diff().long()
    seen = query_lens * batch.seq_lens - query_lens * (query_lens - 1) // 2
    return 4 * query.shape[1] * query.shape[2] * int(seen.sum())


def _scores_case(problem: Problem, decode: PagedBatch, baseline: str, mass: torch.Tensor) -> Case:
    """``anchor_decode`` without an output: keys alone are read."""
    query, scale = problem.query[: decode.num_tokens], problem.layout.head_size**-0.5
    exact = mass.clone()
    return Case(
        name=SCORES,
        op="anchor_decode",
        baseline=baseline,
        read_bytes=_attention_bytes(problem.layout, decode, None) // 2,
        calls=tuple((query, *pair, decode, scale, None, mass) for pair in problem.views),
        results=(mass,),
        reference_call=(query, *problem.views[0], decode, scale, None, exact),
        reference_results=(exact,),
        bounds=lambda expected: [expected[0] * _mass_bound(problem, decode)],
    )


def _mass_bound(problem: Problem, batch: PagedBatch) -> float:
    """How far a block's mass may be off, relative to itself."""
    head_size = problem.layout.head_size
    largest_query = problem.query[: batch.num_tokens].abs().sum(-1).amax()
    largest = float(problem.caches[0].abs().amax() * largest_query) * head_size**-0.5
    return mass_bound(head_size, batch.max_seq_len, largest)


def _attention_bytes(
    layout: PagedKVLayout, batch: PagedBatch, selection: BlockSelection | None
) -> int:
    head_tokens = int(batch.seq_lens.sum()) * layout.num_kv_heads
    if selection is not None:
        # Every selection has the row's last block, of which the tail is not read.
        unused = (-batch.seq_lens % layout.block_size).sum() * layout.num_kv_heads
        head_tokens = int(selection.counts.sum() * layout.block_size - unused)
    return head_tokens * 2 * layout.head_size * layout.dtype.itemsize


def _topk_case(
    problem: Problem, decode: PagedBatch, baseline: str, budget_tokens: int
) -> tuple[Case, BlockSelection]:
    """``block_topk`` over random masses, and the reference's selection of them."""
    block_size, device = problem.layout.block_size, problem.query.device
    shape = (decode.num_reqs, problem.layout.num_kv_heads, decode.block_table.shape[1])
    row_blocks = -(-decode.seq_lens // block_size)
    is_block = torch.arange(shape[2], device=device) < row_blocks[:, None]
    mass = torch.rand(shape, generator=torch.Generator(device), device=device)
    mass *= is_block[:, None]
    budget_blocks = torch.full_like(decode.seq_lens, -(-budget_tokens // block_size))
    forced = (-(-SINK_TOKENS // block_size), -(-RECENT_TOKENS // block_size))
    # As wide as the longest row, like TIDAL_DECODE's buffers: grids depend on it.
    selections = [
        BlockSelection(
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(shape[:2], dtype=torch.int32, device=device),
        )
        for _ in range(3)
    ]
    arguments = (mass, decode.seq_lens, block_size, budget_blocks, *forced)
    case = Case(
        name="block_topk",
        op="block_topk",
        baseline=baseline,
        read_bytes=int(row_blocks.sum()) * shape[1] * mass.itemsize,
        calls=((*arguments, selections[0]),),
        results=(selections[0].logical_blocks, selections[0].counts),
        reference_call=(*arguments, selections[1]),
        reference_results=(selections[1].logical_blocks, selections[1].counts),
        bounds=None,
    )
    reference_of("block_topk").run(*arguments, selections[2])
    return case, selections[2]


def _write_case(problem: Problem) -> Case:
    """``cache_write`` of the batch's new tokens, into caches of its own: they get NaN."""
    batch, layout = problem.batch, problem.layout
    shape = (batch.num_tokens, layout.num_kv_heads, layout.head_size)
    new = torch.randn((2, *shape), device=problem.query.device).to(layout.dtype)
    slots = []
    for row, spec in enumerate(problem.spec.rows):
        first = spec.context_tokens - spec.query_tokens
        tokens = torch.arange(first, spec.context_tokens, device=new.device)
        physical = batch.block_table[row, tokens // layout.block_size].long()
        slots.append(physical * layout.block_size + tokens % layout.block_size)
    slot_mapping = torch.cat(slots)
    cache, expected = (torch.empty_like(problem.caches[0]) for _ in range(2))
    return Case(
        name="cache_write",
        op="cache_write",
        baseline="paged_attention",
        read_bytes=new.numel() * new.itemsize,
        calls=((*new, *kv_views(cache, layout.order), slot_mapping),),
        results=(cache,),
        reference_call=(*new, *kv_views(expected, layout.order), slot_mapping),
        reference_results=(expected,),
        bounds=None,
    )


def reference_of(op: str) -> OpImpl:
    """The op's oracle."""
    return next(impl for impl in OPS[op]() if impl.name == "reference")


def expectations(case: Case) -> list[Expected]:
    """Runs the reference: each result as it should be, and how far it may be off (or None)."""
    _clear(case.reference_results)
    reference_of(case.op).run(*case.reference_call)
    if case.bounds is None:
        return [(expected, None) for expected in case.reference_results]
    bounds = case.bounds(case.reference_results)
    return list(zip(case.reference_results, bounds, strict=True))


def mismatch(impl: OpImpl, case: Case, expected: Sequence[Expected]) -> str | None:
    """Runs an implementation once; None when it agrees with the reference, else how it differs."""
    _clear(case.results)
    impl.run(*case.calls[0])
    for actual, (exact, bound) in zip(case.results, expected, strict=True):
        if bound is None:
            bits = {2: torch.int16, 4: torch.int32}[actual.itemsize]
            wrong = actual.view(bits) != exact.view(bits)
            detail = "must be bit-equal"
        else:
            error = (actual.float() - exact).abs()
            wrong = ~(error <= bound)  # NaN is wrong too
            detail = f"largest error {float(error.max()):.1e}, bound {float(bound.max()):.1e}"
        if wrong.any():
            return f"{int(wrong.sum())} of {wrong.numel()} results are wrong ({detail})"
    return None


def _clear(results: Sequence[torch.Tensor]) -> None:
    """So that an element left out, or written where none is due, is noticed."""
    for result in results:
        result.fill_(torch.nan if result.is_floating_point() else -2)
