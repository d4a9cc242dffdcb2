"""Which rows of vLLM's batch the decode kernels serve.

A token that is the last of a prompt (a prefix hit, a chunk) is prefill, even on its own: what it
writes may serve others through the prefix cache. On CPUs vLLM puts such rows behind the decode
rows, and prefill kernels serve them. On GPUs it does not: runner V2 orders rows by their number of
tokens alone (``sort_batch_req_ids``), and both runners replay a decode graph where every row has
one token. There the decode kernels serve all rows of one token, and those that still read their
prompt read everything, which is data and so is right in a replayed graph too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills


@dataclass(frozen=True)
class RowKinds:
    """How the rows of a batch are served.

    Attributes:
        num_decodes: leading rows that decode kernels serve, a graph's padding among them.
        prompt_rows: of these, rows whose token is of the prompt: they read everything and are no
            decode rows to whoever counts.
    """

    num_decodes: int
    prompt_rows: tuple[int, ...] = ()


def is_prefilling(common: CommonAttentionMetadata) -> torch.Tensor:
    """Whether each row still reads its prompt, ``[num_reqs]`` bool on the host; a graph's padding,
    which runner V2 leaves out, does not.
    """
    flags = torch.zeros(common.num_reqs, dtype=torch.bool)
    if common.is_prefilling is not None:
        known = common.is_prefilling[: common.num_reqs]
        flags[: len(known)] = known
    return flags


def query_positions(query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> list[range]:
    """Positions of each row's query tokens.

    Args:
        query_start_loc: ``[num_reqs + 1]`` on the host.
        seq_lens: ``[num_reqs]`` on the host, exact.
    """
    ends = seq_lens.tolist()
    starts = (seq_lens - query_start_loc[1 : len(ends) + 1] + query_start_loc[: len(ends)]).tolist()
    return [range(*positions) for positions in zip(starts, ends, strict=True)]


def kinds_by_order(common: CommonAttentionMetadata) -> RowKinds:
    """Where prefill kernels serve all that is prefill (CPUs); vLLM puts decode rows first."""
    num_decodes, *_ = split_decodes_and_prefills(
        common, treat_short_extends_as_decodes=common.is_prefilling is None
    )
    return RowKinds(num_decodes)


def kinds_by_tokens(common: CommonAttentionMetadata) -> RowKinds:
    """Where decode kernels serve every row of one token (GPUs).

    Raises:
        RuntimeError: a decode row stands behind a row of several tokens: it would be served dense
            without anybody's knowing.
    """
    prefilling = is_prefilling(common)
    num_decodes = common.num_reqs
    if common.max_query_len > 1:
        starts = common.query_start_loc_cpu[: common.num_reqs + 1]
        query_lens = starts[1:] - starts[:-1]
        longer = (query_lens > 1).nonzero().flatten().tolist()
        num_decodes = longer[0] if longer else num_decodes
        if bool(((query_lens == 1) & ~prefilling)[num_decodes:].any()):
            raise RuntimeError(
                "vLLM's batch has decode rows behind rows of several tokens, which this release "
                f"does not serve: {query_lens.tolist()} query tokens by row"
            )
    prompt_rows = prefilling[:num_decodes].nonzero().flatten().tolist()
    return RowKinds(num_decodes, tuple(prompt_rows))
