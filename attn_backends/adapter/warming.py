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


@torch.inference_mode()
def warm_up_builders(runner: Any, vllm_config: VllmConfig) -> None:
    """Runs every op that a method uses, on the caches and block tables of the engine.

    Args:
        runner: vLLM's V1 or V2 model runner; its KV cache is allocated.
        vllm_config: of the engine.
    """
    limits = Limits(
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.model_config.max_model_len,
    )
    builders: list[ExtMetadataBuilder] = []
    block_tables: dict[str, torch.Tensor] = {}
    for group_id, groups in enumerate(runner.attn_groups):
        for group in groups:
            builder = group.get_metadata_builder(0)
            if isinstance(builder, ExtMetadataBuilder):
                builders.append(builder)
                table = _block_table(runner, group_id)
                block_tables |= dict.fromkeys(group.layer_names, table)
    for builder in builders:  # a layer may need the tables of all groups
        builder.warm_up(block_tables, limits)
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
    if layer.impl.is_dropped:
        return
    for num_tokens in {*ROW_COUNTS, *PROMPT_TOKENS} - {0}:
        if num_tokens <= limits.max_num_tokens:
            layer.impl.write_nothing(layer.kv_cache, num_tokens)
