"""The drafter of lossless mode on vLLM's V1 runner: the served model itself, with sparse rows.

Stock vLLM's draft model has layers, a cache and metadata of its own, and computes accepted tokens
once more for it. Here drafts lie in the request's own slots, from the first token on that is not
verified: the dense pass of the next step writes each layer's keys there before it reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from attn_backends.adapter.metadata import ExtMetadataBuilder
from attn_backends.config import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.sample.metadata import SamplingMetadata


@dataclass(frozen=True)
class _DraftRows:
    """Rows of the batch that draft.

    Attributes:
        places: in the batch.
        lengths: ``[num_rows]`` int32, tokens whose keys are there and right.
        block_table: ``[num_rows, max_blocks]`` int32.
    """

    places: list[int]
    lengths: torch.Tensor
    block_table: torch.Tensor

    def slots(self, positions: torch.Tensor, block_size: int) -> torch.Tensor:
        """``[num_rows]`` int64: where the token at each row's position is written."""
        blocks = self.block_table.gather(1, (positions // block_size)[:, None])[:, 0]
        return blocks.long() * block_size + positions % block_size

    def common(self, draft_index: int, slots: torch.Tensor) -> CommonAttentionMetadata:
        """The rows with one query each, the token of draft ``draft_index`` among their tokens."""
        num_rows = len(self.places)
        seq_lens = self.lengths + (draft_index + 1)
        starts = torch.arange(num_rows + 1, dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=seq_lens,
            num_reqs=num_rows,
            num_actual_tokens=num_rows,
            max_query_len=1,
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=self.block_table,
            slot_mapping=slots,
            seq_lens_cpu_upper_bound=seq_lens,
            req_idx=np.array(self.places),
        )


class SelfProposer(DraftModelProposer):
    """Drafts with the served model; on CPUs, where tensors can be looked at.

    Args:
        vllm_config: of the engine.
        device: of the model.
        runner: vLLM's V1 model runner, which will ask.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any) -> None:
        super().__init__(vllm_config, device, runner)
        self._runner = runner

    def load_model(self, target_model: torch.nn.Module) -> None:
        """See ``SpecDecodeBaseProposer.load_model``: there is nothing to load."""
        self.model = target_model

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """See ``SpecDecodeBaseProposer.initialize_attn_backend``: the served layers' builder.

        Raises:
            ConfigError: layers of several kinds, which have several caches or builders.
        """
        groups = [group for groups in self._runner.attn_groups for group in groups]
        builders = [group.get_metadata_builder(0) for group in groups]
        if len(groups) != 1 or not isinstance(builders[0], ExtMetadataBuilder):
            raise ConfigError(
                f"lossless_tokens needs attention layers of one kind, but this model has "
                f"{len(groups)} groups of them; set it to 0"
            )
        self._builder: ExtMetadataBuilder = builders[0]
        self._layer_names = groups[0].layer_names

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """See ``SpecDecodeBaseProposer.dummy_run``: the served model has just been run."""

    @torch.inference_mode()
    def propose(  # type: ignore[override]
        self,
        num_speculative_tokens: int,
        *,
        next_token_ids: torch.Tensor,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        **others: Any,
    ) -> list[list[int]]:
        """Drafts for the rows of the step that has just been verified.

        Args:
            num_speculative_tokens: of each row.
            next_token_ids: ``[num_reqs]``, what the step has sampled last in each row.
            common_attn_metadata: of the step.
            sampling_metadata: of the batch.
            num_rejected_tokens_gpu: ``[num_reqs]``, of each row's tokens; None: none.
            others: for drafters that have keys of their own.

        Returns:
            Token ids of every row of the batch; none of those that still read their prompt, and
            none at all where drafting would leave nothing out in any row.
        """
        self._last_draft_probs = None
        num_reqs = common_attn_metadata.num_reqs
        drafts: list[list[int]] = [[] for _ in range(num_reqs)]
        reads_prompt = self._runner.discard_request_mask.np[:num_reqs]
        places = [row for row in range(num_reqs) if not reads_prompt[row]]
        if not places:
            return drafts
        lengths = common_attn_metadata.seq_lens[:num_reqs]
        if num_rejected_tokens_gpu is not None:
            lengths = lengths - num_rejected_tokens_gpu
        table = common_attn_metadata.block_table_tensor
        rows = _DraftRows(places, lengths[places], table[places])
        first = next_token_ids[places]
        if sampling_metadata.temperature is not None:
            own = sampling_metadata.temperature[places]
            sampling_metadata = replace(sampling_metadata, temperature=own)
        tokens, probs = self._draft(rows, first, num_speculative_tokens, sampling_metadata)
        if tokens is None:
            return drafts
        for place, drafted in zip(places, tokens.tolist(), strict=True):
            drafts[place] = drafted
        if probs is not None:
            self._last_draft_probs = probs.new_zeros((num_reqs, *probs.shape[1:]))
            self._last_draft_probs[places] = probs
        return drafts

    def _draft(
        self,
        rows: _DraftRows,
        token_ids: torch.Tensor,
        num_drafts: int,
        sampling_metadata: SamplingMetadata,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Tokens ``[num_rows, num_drafts]``, or None where no row would leave anything out; and
        what each was sampled from, ``[num_rows, num_drafts, vocab_size]``, unless all are greedy.
        """
        tokens, probs = [], []
        for index in range(num_drafts):
            positions = rows.lengths.long() + index
            slots = rows.slots(positions, self._builder.kv_cache_spec.block_size)
            metadata = self._builder.build_for_drafting(rows.common(index, slots), index)
            if not metadata.plan.narrowed_rows:
                return None, None
            with set_forward_context(
                dict.fromkeys(self._layer_names, metadata),
                self.vllm_config,
                num_tokens=len(rows.places),
                slot_mapping=dict.fromkeys(self._layer_names, slots),
            ):
                hidden = self.model(input_ids=token_ids.int(), positions=positions)
            token_ids, own_probs = self._sample_draft_tokens(hidden, sampling_metadata)
            tokens.append(token_ids)
            if own_probs is not None:
                probs.append(own_probs)
        return torch.stack(tokens, 1), torch.stack(probs, 1) if probs else None
