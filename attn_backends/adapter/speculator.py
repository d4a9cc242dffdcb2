"""The drafter of lossless mode on vLLM's V2 runner; see ``proposer.py`` for V1's.

Nothing here waits for the device or looks at what is there: how many tokens of a row are right is
known on the device alone, and hosts have upper bounds. Each draft is planned like a decode step;
then its tokens go through the model, and what that says is written where the next draft reads it.
All of this is data in buffers that stay: one CUDA graph is every first draft of as many rows, which
chooses what is read, and another every later one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from attn_backends.adapter.metadata import ExtMetadata, ExtMetadataBuilder
from attn_backends.config import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
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
        # Tokens of each row that are right, -1 of padding; how many drafts follow them by now.
        self._lengths = torch.full((self.max_num_reqs,), -1, dtype=torch.int32, device=device)
        self._is_drafting = torch.zeros(self.max_num_reqs, dtype=torch.bool, device=device)
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
        """See ``BaseSpeculator.init_cudagraph_manager``: full graphs where decode has them."""
        has_graphs = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if has_graphs else CUDAGraphMode.NONE
        # Attributes each: vLLM, which measures what graphs take, looks for managers among them.
        self._first_graphs, self._later_graphs = (
            CudaGraphManager(self.vllm_config, self.device, mode, decode_query_len=1)
            for _ in range(2)
        )

    def capture(self) -> None:
        """See ``BaseSpeculator.capture``."""
        self._first_graphs.capture(self._prepared(0), "Capturing first drafts")
        if self.num_speculative_steps > 1:
            self._later_graphs.capture(self._prepared(1), "Capturing later drafts")

    def _prepared(self, draft_index: int) -> Any:
        """See ``CreateForwardFn`` of vLLM: a draft of rows that are nobody's."""

        def prepare(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            num_rows = desc.num_reqs
            assert num_rows is not None
            self.idx_mapping.fill_(-1)
            self._lengths.fill_(0)
            self._draft_step.fill_(draft_index)
            self.block_tables.get_dummy_block_tables(num_rows)
            bounds = torch.ones(num_rows, dtype=torch.int32)
            self._advance(num_rows)
            for index in range(draft_index + 1):  # later ones read what the first one kept
                metadata = self._metadata(num_rows, bounds, None, index)
            return lambda cg_mode: self._draft(num_rows, metadata)

        return prepare

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
        self._begin(input_batch, num_sampled, num_rejected, last_sampled)
        desc = self._first_graphs.dispatch(num_reqs, num_reqs, 1, 0)
        num_rows = num_reqs if desc.num_reqs is None else desc.num_reqs
        bounds = torch.zeros(num_rows, dtype=torch.int32)
        known = input_batch.seq_lens_cpu_upper_bound[:num_reqs]
        places = input_batch.idx_mapping_np[:num_reqs]
        for index in range(num_speculative_tokens or self.num_speculative_steps):
            self._advance(num_rows)
            torch.add(known, index + 1, out=bounds[:num_reqs]).clamp_max_(self.max_model_len)
            metadata = self._metadata(num_rows, bounds, places, index)
            if desc.cg_mode == CUDAGraphMode.FULL:
                (self._later_graphs if index else self._first_graphs).run_fullgraph(desc)
            else:
                self._draft(num_rows, metadata)
        return drafts

    def _begin(
        self,
        batch: InputBatch,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
    ) -> None:
        """Writes what the first draft starts from; behind the rows, padding."""
        num_reqs = batch.num_reqs
        self._lengths.fill_(-1)
        torch.sub(batch.seq_lens[:num_reqs], num_rejected[:num_reqs], out=self._lengths[:num_reqs])
        self._is_drafting[:num_reqs] = num_sampled[:num_reqs] > 0
        self.input_buffers.input_ids[:num_reqs] = last_sampled[batch.idx_mapping].view(-1)
        self._draft_step.zero_()

    def _advance(self, num_rows: int) -> None:
        """Writes where the next draft of each row stands and is stored."""
        lengths = self._lengths[:num_rows]
        ends = lengths + self._draft_step
        positions = ends.clamp(0, self.max_model_len - 1)
        self.input_buffers.positions[:num_rows] = positions
        seq_lens = (positions + 1).masked_fill(lengths < 0, 0)  # padding has no tokens
        self.input_buffers.seq_lens[:num_rows] = seq_lens
        # Past the model's length vLLM takes no draft; it must not hide the last token's keys.
        is_written = self._is_drafting[:num_rows] & (ends < self.max_model_len)
        self.block_tables.compute_slot_mappings(
            self.idx_mapping[:num_rows].masked_fill(~is_written, -1),
            self._starts[: num_rows + 1],
            self.input_buffers.positions[:num_rows],
            num_rows,
        )

    def _metadata(
        self,
        num_rows: int,
        bounds: torch.Tensor,
        places: Any,
        draft_index: int,
    ) -> ExtMetadata:
        """Of rows with one query each, the last of their tokens.

        Args:
            num_rows: padding included.
            bounds: ``[num_rows]`` int32 on the host, what the rows' lengths are at most.
            places: of the rows in the runner's table of requests; None where they are nobody's.
            draft_index: which draft of the step.
        """
        common = CommonAttentionMetadata(
            query_start_loc=self._starts[: num_rows + 1],
            query_start_loc_cpu=self._starts_cpu[: num_rows + 1],
            seq_lens=self.input_buffers.seq_lens[:num_rows],
            num_reqs=num_rows,
            num_actual_tokens=num_rows,
            max_query_len=1,
            max_seq_len=self.max_model_len,
            block_table_tensor=self.block_tables.input_block_tables[0][:num_rows],
            slot_mapping=self.block_tables.slot_mappings[0, :num_rows],
            seq_lens_cpu_upper_bound=bounds,
            positions=self.input_buffers.positions[:num_rows],
            req_idx=places,
        )
        return self._builder.build_for_drafting(common, draft_index)

    def _draft(self, num_rows: int, metadata: ExtMetadata) -> None:
        """One draft of each row, from its token in the input buffers to the next one there."""
        slots = self.block_tables.slot_mappings[:, :num_rows]
        tokens, positions = (
            buffer[:num_rows]
            for buffer in (self.input_buffers.input_ids, self.input_buffers.positions)
        )
        with set_forward_context(
            dict.fromkeys(self._layer_names, metadata),
            self.vllm_config,
            num_tokens=num_rows,
            slot_mapping=build_slot_mappings_by_layer(slots, self.kv_cache_config),
        ):
            hidden = self.model(input_ids=tokens, positions=positions)
        drafted = self.sample_draft(
            hidden,
            positions,
            self.idx_mapping[:num_rows],
            self.temperature,
            self.seeds,
            self._draft_step,
            self.draft_logits,
        )
        self.draft_tokens[:num_rows].index_copy_(1, self._draft_step[None], drafted[:, None])
        tokens.copy_(drafted)
        self._draft_step.add_(1)
