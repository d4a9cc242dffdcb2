"""``selection_per``: query heads that select for themselves equal a model without KV groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from attn_backends.adapter.impl import ExtAttentionImpl
from attn_backends.adapter.ops import ORDER_OF_DEVICE, resolve_ops
from attn_backends.batch import PagedBatch
from attn_backends.config import ConfigError
from attn_backends.method import Geometry
from attn_backends.methods.tidal_decode import METHOD, TidalConfig
from attn_backends.ops.dispatch import OpContext
from attn_backends.plan import DecodePlan, LayerRole
from kvcache.layout import PagedKVLayout, kv_views

ROWS, KV_HEADS, GROUP, HEAD, BLOCK, BLOCKS = 2, 2, 3, 32, 32, 12
QUERY_HEADS = KV_HEADS * GROUP
ORDER = ORDER_OF_DEVICE["cpu"]
SEQ_LENS = [370, 200]


def _decode(
    cache: torch.Tensor, head_map: list[int], selection_per: str, kernel: str
) -> torch.Tensor:
    """Outputs of an anchor and of a layer that reuses its choice through ``head_map``."""
    num_kv_heads = cache.shape[1]
    layout = PagedKVLayout(ROWS * BLOCKS, BLOCK, num_kv_heads, HEAD, torch.float32, ORDER)
    ops = resolve_ops(OpContext(layout, QUERY_HEADS, "cpu", with_rule=False), kernel)
    geometry = Geometry(3, num_kv_heads, QUERY_HEADS, HEAD, BLOCK, ROWS, BLOCKS * BLOCK)
    config = TidalConfig(
        budget_tokens=128,
        sink_tokens=32,
        recent_tokens=32,
        min_context_tokens=0,
        selection_per=selection_per,
    )
    selector = METHOD.make_selector(config, geometry, torch.device("cpu"))
    batch = PagedBatch(
        query_start_loc=torch.arange(ROWS + 1, dtype=torch.int32),
        seq_lens=torch.tensor(SEQ_LENS, dtype=torch.int32),
        block_table=torch.arange(ROWS * BLOCKS, dtype=torch.int32).view(ROWS, BLOCKS),
        num_reqs=ROWS,
        num_tokens=ROWS,
        max_query_len=1,
        max_seq_len=max(SEQ_LENS),
    )
    roles = {"anchor": LayerRole.SELF, "reuse": LayerRole.REUSE}
    plan = DecodePlan(
        num_tokens=ROWS,
        num_decode_tokens=ROWS,
        decode=batch,
        prefill=None,
        selection=selector.select(batch),
        anchor=selector.anchor_state(batch, {}),
        decode_rule=None,
        prefill_rule=None,
        decodes_densely=False,
        roles=roles,
        head_maps={"reuse": torch.tensor(head_map)},
        inheriting=frozenset(),
        selecting_rows=[],
        checked=None,
        kept=None,
    )
    impl: Any = object.__new__(ExtAttentionImpl)
    impl.scale = HEAD**-0.5
    generator = torch.Generator().manual_seed(1)
    out = torch.empty(2, ROWS, QUERY_HEADS, HEAD)
    for index, name in enumerate(roles):
        query = 3 * torch.randn(ROWS, QUERY_HEADS, HEAD, generator=generator)
        impl._decode(name, plan, ops, query, kv_views(cache, ORDER), out[index])
    return out


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_query_heads_select_as_without_groups(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(ROWS * BLOCKS, KV_HEADS, BLOCK, 2 * HEAD, generator=generator)
    ungrouped = cache.repeat_interleave(GROUP, dim=1)
    head_map = [1, 0]
    ungrouped_map = [head_map[head // GROUP] * GROUP + head % GROUP for head in range(QUERY_HEADS)]
    served = _decode(cache, head_map, "query_head", kernel)
    torch.testing.assert_close(served, _decode(ungrouped, ungrouped_map, "kv_head", kernel))
    shared = _decode(cache, head_map, "kv_head", kernel)
    assert not torch.allclose(served, shared, atol=1e-3), "the heads of a group choose alike"


def test_what_cannot_be_honoured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"selection_per is 'token'; .* kv_head, query_head"):
        TidalConfig(selection_per="token")
    with pytest.raises(ConfigError, match=r"query_head with reselect_steps 4, .* to 1"):
        TidalConfig(selection_per="query_head", reselect_steps=4)
