"""vLLM's per-layer attention implementation: executes the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from attn_backends.adapter.metadata import ExtMetadata
from attn_backends.adapter.ops import ORDER_OF_DEVICE, Ops, resolve_ops
from attn_backends.batch import BlockSelection, PagedBatch
from attn_backends.config import ConfigError
from attn_backends.ops.dispatch import OpContext, OpImpl
from attn_backends.plan import SELECTING_ROLES, AnchorState, DecodePlan, LayerRole
from attn_backends.recall import SERVED, inherited_recall, own_recall, served_recall
from kvcache.layout import PagedKVLayout, kv_views


class ExtAttentionImpl(AttentionImpl[ExtMetadata]):
    """One attention layer.

    Raises:
        ConfigError: the layer has a feature that our kernels would ignore.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        checks = {
            "ALiBi": alibi_slopes is not None,
            "sliding-window layers of the model itself": sliding_window is not None,
            f"KV cache dtype {kv_cache_dtype}": kv_cache_dtype != "auto",
            "attention logit soft-capping": bool(logits_soft_cap),
            f"attention type {attn_type}": attn_type != AttentionType.DECODER,
            "layers that share the KV cache of others": kv_sharing_target_layer_name is not None,
            **{f"layer option {key}": value is not None for key, value in extra.items()},
        }
        reasons = [reason for reason, present in checks.items() if present]
        if reasons:
            raise ConfigError(f"this attention layer needs {'; '.join(reasons)}: not supported")
        self.is_dropped = False  # set by dropping.py: attends nothing, owns no KV cache
        self._kernel = _configured_kernel()
        self._kv_cache: torch.Tensor | None = None
        self._views: tuple[torch.Tensor, torch.Tensor]
        self._cache_write: OpImpl

    def _cache_views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The engine binds one cache tensor per layer and keeps it; the views are made once.
        if kv_cache is not self._kv_cache:
            _num_blocks, num_kv_heads, block_size, double_head = kv_cache.shape
            device_type = kv_cache.device.type
            order = ORDER_OF_DEVICE[device_type]
            layout = PagedKVLayout(
                1, block_size, num_kv_heads, double_head // 2, kv_cache.dtype, order
            )
            context = OpContext(layout, self.num_heads, device_type, with_rule=False)
            self._cache_write = resolve_ops(context, self._kernel).cache_write
            self._views = kv_views(kv_cache, order)
            self._kv_cache = kv_cache
        return self._views

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes this step's keys and values; ``[num_tokens, num_kv_heads, head_size]``."""
        if self.is_dropped:
            return  # ``kv_cache`` is another layer's
        views = self._cache_views(kv_cache)
        self._cache_write.run(key, value, *views, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ExtMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step.

        Args:
            layer: the vLLM layer; its name selects the role.
            query: ``[num_tokens, num_heads, head_size]``, possibly padded at the end.
            key, value: unused, already in the cache.
            kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
            attn_metadata: None while the engine profiles.
            output: like ``query``; written in place.
            output_scale, output_block_scale: fused quantisation, not supported.
        """
        if attn_metadata is None or self.is_dropped:
            return output.zero_()
        plan, ops = attn_metadata.of_layer(layer.layer_name)
        views = self._cache_views(kv_cache)
        if plan.decode is not None:
            rows = slice(0, plan.num_decode_tokens)
            self._decode(layer.layer_name, plan, ops, query[rows], views, output[rows])
        if plan.prefill is not None:
            rows = slice(plan.num_decode_tokens, plan.num_tokens)
            # The rule is the selecting layers'; a dense layer beside them reads everything.
            is_dense = plan.roles[layer.layer_name] is LayerRole.DENSE
            rule = None if is_dense else plan.prefill_rule
            ops.paged_attention.run(
                query[rows], *views, plan.prefill, rule, self.scale, output[rows]
            )
        return output

    def _decode(
        self,
        layer_name: str,
        plan: DecodePlan,
        ops: Ops,
        query: torch.Tensor,
        views: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        role = plan.roles[layer_name]
        decode, selection = plan.decode, plan.selection
        assert decode is not None
        if plan.decodes_densely or role is LayerRole.DENSE:
            ops.anchor_decode.run(query, *views, decode, self.scale, out, None)
            return
        assert selection is not None
        num_kv_heads = views[0].shape[1]
        parts = selection.counts.shape[1] // num_kv_heads
        if parts == 1:
            self._decode_selected(layer_name, plan, ops, query, views, selection, out)
            return
        assert query.shape[1] == parts * num_kv_heads, "layers differ in query heads"
        for index in range(parts):  # the index-th query head of every KV head
            part_query = query[:, index::parts].contiguous()
            part_out = torch.empty_like(part_query)
            part = selection.part(index, num_kv_heads)
            self._decode_selected(layer_name, plan, ops, part_query, views, part, part_out)
            out[:, index::parts] = part_out

    def _decode_selected(
        self,
        layer_name: str,
        plan: DecodePlan,
        ops: Ops,
        query: torch.Tensor,
        views: tuple[torch.Tensor, torch.Tensor],
        selection: BlockSelection,
        out: torch.Tensor,
    ) -> None:
        """A layer that makes or reads a selection, for query heads that share one per KV head."""
        role, decode = plan.roles[layer_name], plan.decode
        assert decode is not None
        if role in SELECTING_ROLES and plan.kept is not None:
            self._reselect(layer_name, plan, ops, query, views)
        elif role in SELECTING_ROLES:
            assert plan.anchor is not None
            attended = out if role is LayerRole.ANCHOR else None
            inherits = layer_name in plan.inheriting
            self._select(inherits, ops, query, views, decode, plan.anchor, selection, attended)
        if role is LayerRole.ANCHOR:
            return
        head_map = plan.head_maps.get(layer_name)
        if head_map is not None:
            selection = BlockSelection(
                selection.logical_blocks[:, head_map], selection.counts[:, head_map]
            )
        if role is LayerRole.REUSE and plan.checked is not None:
            self._check(plan, ops, query, views, selection)
        ops.sparse_decode.run(query, *views, decode, selection, plan.decode_rule, self.scale, out)

    def _select(
        self,
        inherits: bool,
        ops: Ops,
        query: torch.Tensor,
        views: tuple[torch.Tensor, torch.Tensor],
        decode: PagedBatch,
        anchor: AnchorState,
        selection: BlockSelection,
        attended: torch.Tensor | None,
    ) -> None:
        """Overwrites ``selection`` (the anchor's before, if it ``inherits``) with this layer's."""
        ops.anchor_decode.run(query, *views, decode, self.scale, attended, anchor.block_mass)
        own, inherited, _ = anchor.recall.unbind(1)
        if inherits:
            before = inherited_recall(anchor.block_mass, selection)
            torch.minimum(inherited, before, out=inherited)
        ops.block_topk.run(
            anchor.block_mass,
            decode.seq_lens,
            views[0].shape[2],
            anchor.budget_blocks,
            anchor.sink_blocks,
            anchor.recent_blocks,
            selection,
        )
        torch.minimum(own, own_recall(anchor.block_mass, selection), out=own)

    def _reselect(
        self,
        layer_name: str,
        plan: DecodePlan,
        ops: Ops,
        query: torch.Tensor,
        views: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Rows that are due select and keep what they selected; then all read what is kept."""
        anchor, selection, kept = plan.anchor, plan.selection, plan.kept
        assert anchor is not None
        assert selection is not None
        assert kept is not None
        store = kept.stores[layer_name]
        if kept.due is not None:
            rows = kept.due.rows
            due = replace(
                anchor,
                block_mass=anchor.block_mass[: len(rows)],
                budget_blocks=anchor.budget_blocks[rows],
                recall=anchor.recall[rows],
            )
            chosen = BlockSelection(selection.logical_blocks[rows], selection.counts[rows])
            inherits = layer_name in plan.inheriting
            self._select(inherits, ops, query[rows], views, kept.due.batch, due, chosen, None)
            anchor.recall[rows] = due.recall
            slots = kept.slots[rows]
            store.logical_blocks[slots] = chosen.logical_blocks
            store.counts[slots] = chosen.counts
        torch.index_select(store.logical_blocks, 0, kept.slots, out=selection.logical_blocks)
        torch.index_select(store.counts, 0, kept.slots, out=selection.counts)

    def _check(
        self,
        plan: DecodePlan,
        ops: Ops,
        query: torch.Tensor,
        views: tuple[torch.Tensor, torch.Tensor],
        selection: BlockSelection,
    ) -> None:
        """Lowers the checked rows' served recall to this layer's; its output is not touched."""
        assert plan.checked is not None
        assert plan.anchor is not None
        rows = plan.checked.rows
        # The last anchor's masses have been used: their memory holds this layer's.
        mass = plan.anchor.block_mass[: len(rows)]
        ops.anchor_decode.run(query[rows], *views, plan.checked.batch, self.scale, None, mass)
        given = BlockSelection(selection.logical_blocks[rows], selection.counts[rows])
        best = BlockSelection(
            torch.empty_like(given.logical_blocks), torch.empty_like(given.counts)
        )
        ops.block_topk.run(
            mass,
            plan.checked.batch.seq_lens,
            views[0].shape[2],
            plan.anchor.budget_blocks[rows],
            plan.anchor.sink_blocks,
            plan.anchor.recent_blocks,
            best,
        )
        served = plan.anchor.recall[:, SERVED]
        served[rows] = torch.minimum(served[rows], served_recall(mass, given, best))


def _configured_kernel() -> str:
    from vllm.config import get_current_vllm_config

    from attn_backends.adapter.config import chosen_method, method_config

    vllm_config = get_current_vllm_config()
    method = chosen_method(vllm_config)
    return "auto" if method is None else method_config(vllm_config, method).kernel
