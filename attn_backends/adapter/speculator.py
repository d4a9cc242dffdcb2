"""The drafter of lossless mode on vLLM's V2 runner; see ``proposer.py`` for V1's.

Nothing here waits for the device or looks at what is there: how many tokens of a row are right is
known on the device alone, and hosts have upper bounds. Drafts are made step by step, without CUDA
graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from attn_backends.adapter.metadata import ExtMetadataBuilder
from attn_backends.config import ConfigError

if TYPE_CHECKING:
    from vllm.config import CUDAGraphMode, VllmConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch


class SelfSpeculator(DraftModelSpeculator):
    """Drafts with the served model.

    Args:
        vllm_config: of the engine.
        device: of the model.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self._starts = torch.arange(self.max_num_reqs + 1, dtype=torch.int32, device=device)
        self._starts_cpu = torch.arange(self.max_num_reqs + 1, dtype=torch.int32)
        self._draft_step = torch.zeros((), dtype=torch.int64, device=device)
        # Of the model's own layers: they are the target's.
        self.attn_groups: list[Any] = []

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        """See ``DraftModelSpeculator.load_draft_model``: there is nothing to load."""
        return target_model

    def set_attn(  # type: ignore[override]
        self,
        model_state: Any,
        kv_cache_config: Any,
        block_tables: Any,
        target_input_buffers: Any,
        target_attn_groups: list[list[Any]],
    ) -> None:
        """See ``DraftModelSpeculator.set_attn``: the served layers' builder.

        Raises:
            ConfigError: layers of several kinds, which have several caches or builders.
        """
        groups = [group for groups in target_attn_groups for group in groups]
        builders = [group.get_metadata_builder(0) for group in groups]
        if len(groups) != 1 or not isinstance(builders[0], ExtMetadataBuilder):
            raise ConfigError(
                f"lossless_tokens needs attention layers of one kind, but this model has "
                f"{len(groups)} groups of them; set it to 0"
            )
        self.model_state, self.kv_cache_config = model_state, kv_cache_config
        self.block_tables = block_tables
        self._builder: ExtMetadataBuilder = builders[0]
        self._layer_names = groups[0].layer_names

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """See ``BaseSpeculator.init_cudagraph_manager``: drafts have no graphs."""

    def capture(self) -> None:
        """See ``BaseSpeculator.capture``."""

    @torch.inference_mode()
    def propose(  # type: ignore[override]
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        *,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """See ``BaseSpeculator.propose``. Of what vLLM knows of the step, ``input_batch`` has the
        rows and what is sampled the tokens that end them; rows that still read their prompts draft
        as well, into no slot, and nobody asks for it.

        Returns:
            ``[num_reqs, num_speculative_steps]`` int64.
        """
        num_reqs = input_batch.num_reqs
        drafts = self.draft_tokens[:num_reqs]
        if dummy_run:  # the served model has just been run
            return drafts
        self._copy_request_inputs(num_reqs, input_batch.idx_mapping, temperature, seeds)
        is_drafting = num_sampled[:num_reqs] > 0
        rows = self.idx_mapping[:num_reqs]
        lengths = input_batch.seq_lens[:num_reqs] - num_rejected[:num_reqs]
        tokens = last_sampled[input_batch.idx_mapping].view(-1)
        for index in range(num_speculative_tokens or self.num_speculative_steps):
            # Past the model's length vLLM takes no draft; it must not hide the last token's keys.
            is_written = is_drafting & (lengths + index < self.max_model_len)
            positions = (lengths + index).clamp(max=self.max_model_len - 1).long()
            slots = self.block_tables.compute_slot_mappings(
                torch.where(is_written, rows, -1), self._starts[: num_reqs + 1], positions, num_reqs
            )
            common = self._common(input_batch, index, positions, slots[0])
            hidden = self._run(tokens.int(), positions, common, slots, index)
            self._draft_step.fill_(index)
            tokens = self.sample_draft(
                hidden,
                positions,
                rows,
                self.temperature,
                self.seeds,
                self._draft_step,
                self.draft_logits,
            )
            drafts[:, index] = tokens
        return drafts

    def _common(
        self, batch: InputBatch, draft_index: int, positions: torch.Tensor, slots: torch.Tensor
    ) -> CommonAttentionMetadata:
        """Rows with one query each, the last of their tokens."""
        num_reqs = batch.num_reqs
        bounds = batch.seq_lens_cpu_upper_bound[:num_reqs] + (draft_index + 1)
        return CommonAttentionMetadata(
            query_start_loc=self._starts[: num_reqs + 1],
            query_start_loc_cpu=self._starts_cpu[: num_reqs + 1],
            seq_lens=(positions + 1).int(),
            num_reqs=num_reqs,
            num_actual_tokens=num_reqs,
            max_query_len=1,
            max_seq_len=self.max_model_len,
            block_table_tensor=self.block_tables.input_block_tables[0][:num_reqs],
            slot_mapping=slots,
            seq_lens_cpu_upper_bound=bounds.clamp(max=self.max_model_len),
            positions=positions,
            req_idx=batch.idx_mapping_np[:num_reqs],
        )

    def _run(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        common: CommonAttentionMetadata,
        slots: torch.Tensor,
        draft_index: int,
    ) -> torch.Tensor:
        """Hidden states ``[num_reqs, hidden_size]`` of one token in each row."""
        metadata = self._builder.build_for_drafting(common, draft_index)
        with set_forward_context(
            dict.fromkeys(self._layer_names, metadata),
            self.vllm_config,
            num_tokens=common.num_reqs,
            slot_mapping=build_slot_mappings_by_layer(slots, self.kv_cache_config),
        ):
            hidden: torch.Tensor = self.model(input_ids=token_ids, positions=positions)
        return hidden
