"""Problems for ``vllm-ext bench kernel``: batches written as text, tensors, and what is right.

A batch is rows over one paged cache. Its decode rows (one query token) come first, as vLLM
orders them; the decode ops serve those, ``paged_attention`` and ``cache_write`` all rows.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch

from attn_backends.batch import BlockSelection, PagedBatch
from attn_backends.ops.dispatch import OpContext
from attn_backends.ops.resolution import ORDER_OF_DEVICE
from kvcache.layout import PagedKVLayout, kv_views
from vllm_ext.bench.shapes import SHAPES
from vllm_ext.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXAMPLE = "8q1s4k+q512s2k"

# Keys and values of all copies together, so that no cache holds them; on GPUs not even the tenth of
# them that sparse_decode reads by default. A small budget in tokens, and the masses that block_topk
# reads, may well lie in a GPU's L2: shares of the bandwidth say little there.
ROTATED_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
MAX_COPIES = 4
EAGER_FACTOR = 2.0  # as in tests/tolerances.py
EXP_ULPS = 20  # of the least exact exponential in use, ATen's exp_u20

_TERM = re.compile(r"(\d*)q(\d+k?)s(\d+k?)")


@dataclass(frozen=True)
class Shape:
    """Heads and cache geometry of one layer.

    Raises:
        UserError: a size below 1, heads that do not divide, or an unknown dtype.
    """

    query_heads: int
    kv_heads: int
    head_size: int
    block_size: int
    dtype: str  # a key of DTYPES

    def __post_init__(self) -> None:
        for field in ("query_heads", "kv_heads", "head_size", "block_size"):
            if getattr(self, field) < 1:
                flag = "--" + field.replace("_", "-")
                raise UserError(f"{flag} is {getattr(self, field)}; it must be at least 1")
        if self.query_heads % self.kv_heads:
            raise UserError(
                f"--query-heads {self.query_heads} is not a multiple of --kv-heads {self.kv_heads}"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}")


def preset(name: str, block_size: int) -> Shape:
    """The shape of a layer of a known model; ``name`` is one of ``SHAPES``."""
    model = SHAPES[name]
    heads = (model.num_attention_heads, model.num_key_value_heads, model.head_dim)
    return Shape(*heads, block_size, "bf16")


@dataclass(frozen=True)
class Row:
    """One request of a batch; the queries are the last of the context's tokens."""

    query_tokens: int
    context_tokens: int


@dataclass(frozen=True)
class BatchSpec:
    """A batch as the user wrote it, decode rows first."""

    text: str
    rows: tuple[Row, ...]

    @property
    def num_decode(self) -> int:
        """Rows with one query token."""
        return sum(row.query_tokens == 1 for row in self.rows)


def parse_batches(text: str) -> list[BatchSpec]:
    """Batches from text such as ``8q1s4k,8q1s4k+q512s2k``.

    A term is ``[COUNT]qQUERYsCONTEXT``: COUNT rows (1) of QUERY query tokens on CONTEXT
    tokens in all; ``k`` is 1024. ``+`` mixes terms in one batch, a comma starts the next.

    Raises:
        UserError: not this grammar, a zero, or more queries than context.
    """
    specs = []
    for batch_text in (part.strip() for part in text.split(",")):
        rows = [row for term in batch_text.split("+") for row in _parse_term(term.strip())]
        specs.append(BatchSpec(batch_text, tuple(sorted(rows, key=lambda r: r.query_tokens > 1))))
    return specs


def _parse_term(term: str) -> list[Row]:
    match = _TERM.fullmatch(term)
    if match is None:
        raise UserError(
            f"--batches: {term!r} is not [COUNT]qQUERYsCONTEXT; for example {EXAMPLE} is 8 rows "
            "of 1 query token on 4,096 tokens and one chunk of 512 on 2,048"
        )
    count, query, context = (number(group) for group in match.groups(default=""))
    if min(count, query, context) < 1:
        raise UserError(f"--batches: {term!r} has a zero; {EXAMPLE} works")
    if query > context:
        raise UserError(
            f"--batches: {term!r} has {query} query tokens on {context} tokens of context; the "
            f"context counts the queries too: {match[1]}q{match[2]}s{match[2]} works"
        )
    return [Row(query, context)] * count


def number(text: str) -> int:
    """A count as it is written in batches: ``k`` is 1024, nothing is 1."""
    if not text:
        return 1
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


@dataclass(frozen=True)
class Problem:
    """Random tensors for one batch."""

    spec: BatchSpec
    layout: PagedKVLayout
    caches: tuple[torch.Tensor, ...]  # equal copies, each of ``layout.shape``
    query: torch.Tensor  # [num_tokens, query_heads, head_size]
    batch: PagedBatch  # all rows; copies share it, as the layers of a model do
    decode: PagedBatch | None  # the decode rows

    @property
    def context(self) -> OpContext:
        """What an implementation must serve to serve this problem."""
        device_type = self.query.device.type
        return OpContext(self.layout, self.query.shape[1], device_type, with_rule=False)

    @property
    def views(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Key and value views of every copy."""
        return [kv_views(cache, self.layout.order) for cache in self.caches]


def make_problem(spec: BatchSpec, shape: Shape, device_type: str, seed: int = 0) -> Problem:
    """Normal random keys, values and queries; every row's blocks are scattered."""
    device, dtype = torch.device(device_type), DTYPES[shape.dtype]
    generator = torch.Generator(device).manual_seed(seed)
    row_blocks = [-(-row.context_tokens // shape.block_size) for row in spec.rows]
    num_blocks = sum(row_blocks)
    layout = PagedKVLayout(
        num_blocks, shape.block_size, shape.kv_heads, shape.head_size, dtype,
        ORDER_OF_DEVICE[device_type],
    )  # fmt: skip
    cache = torch.empty(layout.shape, dtype=dtype, device=device).normal_(generator=generator)
    copies = min(MAX_COPIES, -(-ROTATED_BYTES[device_type] // (num_blocks * layout.block_bytes)))
    shuffled = torch.randperm(num_blocks, generator=generator, device=device).int()
    table = torch.zeros(len(row_blocks), max(row_blocks), dtype=torch.int32, device=device)
    for row, blocks in enumerate(torch.split(shuffled, row_blocks)):
        table[row, : len(blocks)] = blocks
    query_lens = [row.query_tokens for row in spec.rows]
    seq_lens = [row.context_tokens for row in spec.rows]
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    batch = PagedBatch(
        query_start_loc=starts.to(device, torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_table=table,
        num_reqs=len(seq_lens),
        num_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    decode = None
    if spec.num_decode:
        rows = spec.num_decode
        decode = replace(batch.rows(0, rows, 0, rows), max_query_len=1)
    query_shape = (batch.num_tokens, shape.query_heads, shape.head_size)
    query = torch.empty(query_shape, dtype=dtype, device=device).normal_(generator=generator)
    caches = (cache, *(cache.clone() for _ in range(copies - 1)))
    return Problem(spec, layout, caches, query, batch, decode)


def eager_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    selection: BlockSelection | None,
) -> torch.Tensor:
    """Plain attention with every step in the query's dtype: as exact as is usual.

    Shapes as in the ops' ``api.py``; without a selection every block is read.
    """
    num_kv_heads, block_size = key_cache.shape[1:3]
    group = query.shape[1] // num_kv_heads
    out = torch.empty_like(query)
    starts, offsets = batch.query_start_loc.tolist(), torch.arange(block_size, device=query.device)
    for row, seq_len in enumerate(batch.seq_lens.tolist()):
        queries = slice(starts[row], starts[row + 1])
        first = seq_len - (queries.stop - queries.start)
        positions = torch.arange(first, seq_len, device=query.device)[:, None]
        for head in range(num_kv_heads):
            blocks = torch.arange(-(-seq_len // block_size), device=query.device)
            if selection is not None:
                blocks = selection.logical_blocks[row, head, : selection.counts[row, head]].long()
            hidden = (blocks[:, None] * block_size + offsets).flatten() > positions
            physical = batch.block_table[row, blocks].long()
            keys = key_cache[physical, head].flatten(0, 1)
            values = value_cache[physical, head].flatten(0, 1)
            heads = slice(head * group, (head + 1) * group)
            logits = torch.einsum("qgd,td->gqt", query[queries, heads], keys) * scale
            weights = logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1)
            out[queries, heads] = torch.einsum("gqt,td->qgd", weights, values)
    return out


def attention_bound(exact: torch.Tensor, eager: torch.Tensor, num_terms: int) -> torch.Tensor:
    """How far an attention result may be from the reference's, a scalar.

    tests/tolerances.py: twice the error of an eager computation in the kernel's dtype, plus
    one rounding of the largest result. The yardstick is fp32 and not fp64 here, hence also
    what two fp32 computations may differ by: exponentials, and a random walk of roundings
    over ``num_terms`` summands.
    """
    eager_error = (eager.float() - exact).abs().max()
    fp32_ulps = EXP_ULPS + math.sqrt(num_terms)
    relative = torch.finfo(eager.dtype).eps + fp32_ulps * torch.finfo(torch.float32).eps
    return EAGER_FACTOR * eager_error + relative * exact.abs().max()


def mass_bound(head_size: int, num_tokens: int, largest_logit: float) -> float:
    """How far a block's mass may be from the reference's, relative to itself.

    The worst case of tests/ops/test_anchor_decode.py: roundings of the exponents, the
    exponential's own error and one rounding per summed token; twice, for both sides.
    """
    exponent_error = (head_size + 8) * (largest_logit + math.log(num_tokens))
    return 4 * torch.finfo(torch.float32).eps * (exponent_error + EXP_ULPS + num_tokens)
