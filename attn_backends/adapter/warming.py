"""Our kernels on vLLM's caches before it serves (warm_up.py), and what graph profiling leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_backends.adapter.impl import ExtAttentionImpl
from attn_backends.adapter.metadata import ExtMetadataBuilder
from attn_backends.adapter.planning import attention_layers
from attn_backends.warm_up import PROMPT_TOKENS, ROW_COUNTS, Limits

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SKIPPED_SLOT = -1  # cache_write leaves such a token out


@torch.inference_mode()
def warm_up_builders(runner: Any, vllm_config: VllmConfig) -> None:
    """Runs every op that a method uses, on the caches and block tables of the engine.

    Layers whose heads have caches of their own are left out: vLLM's own warm-up and the capture of
    graphs run them.

    Args:
        runner: vLLM's V1 or V2 model runner; its KV cache is allocated.
        vllm_config: of the engine.
    """
    limits = Limits(
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.model_config.max_model_len,
    )
    for group_id, groups in enumerate(runner.attn_groups):
        for group in groups:
            builder = group.get_metadata_builder(0)
            if isinstance(builder, ExtMetadataBuilder):
                builder.warm_up(_block_table(runner, group_id), limits)
    for layer in attention_layers(vllm_config).values():
        if isinstance(layer.impl, ExtAttentionImpl):
            _write_nothing(layer, limits)


def unbind_caches(vllm_config: VllmConfig) -> None:
    """Layers let go of the caches that they were last called with."""
    for layer in attention_layers(vllm_config).values():
        if isinstance(layer.impl, ExtAttentionImpl):
            layer.impl.unbind()


def _block_table(runner: Any, group_id: int) -> torch.Tensor:
    """That steps read, ``[max_num_reqs, max_blocks]``; its blocks are those of dummy runs."""
    if hasattr(runner, "req_states"):  # V2
        table: torch.Tensor = runner.block_tables.input_block_tables[group_id]
        return table
    table = runner.input_batch.block_table[group_id].get_device_tensor(runner.max_num_reqs)
    return table


def _write_nothing(layer: Any, limits: Limits) -> None:
    """``cache_write`` with slots of padding alone."""
    if layer.impl.is_dropped or layer.impl.is_split:
        return
    kv_cache = layer.kv_cache
    for num_tokens in {*ROW_COUNTS, *PROMPT_TOKENS} - {0}:
        if num_tokens > limits.max_num_tokens:
            continue
        shape = (num_tokens, layer.num_kv_heads, layer.head_size)
        keys = torch.zeros(shape, dtype=kv_cache.dtype, device=kv_cache.device)
        slots = torch.full((num_tokens,), SKIPPED_SLOT, device=kv_cache.device)
        layer.impl.do_kv_cache_update(layer, keys, keys, kv_cache, slots)
