"""vLLM 0.32's rejection sampler on CPUs, mended for drafts of requests with a temperature.

What: two kernels of it are registered anew, by vLLM's hook for that (which warns that others were
    registered), and its runner's sampler is a ``VerifyingSampler``.
Why: sampled answers have other distributions than the model's, or the engine ends:
    ``_expand_kernel_impl`` writes whole numbers into a copy of its output and drops it, so that
    temperature, ``top_k`` and ``top_p`` of verified tokens are whatever was in memory;
    ``rejection_random_sample_kernel_impl`` looks up the probability of a draft that is none (-1,
    which vLLM's scheduler gives a request whose whole prompt but one token was cached) and may keep
    it; ``apply_top_k_only`` asks for the maximum of nothing where no row of a batch has a draft.
Upstream: vllm/utils/cpu_triton_utils.py, csrc/cpu/spec_decode_utils.cpp and
    vllm/v1/sample/ops/topk_topp_sampler.py of v0.32.0;
    https://github.com/vllm-project/vllm/issues/55005 and its pull request 55006 for the first.
Remove when: tests/adapter/test_compat_sampling.py says which is no longer needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.triton_utils.dispatcher import register_kernels
from vllm.utils import cpu_triton_utils
from vllm.v1.sample.rejection_sampler import RejectionSampler

if TYPE_CHECKING:
    from vllm.v1.outputs import SamplerOutput
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

KERNELS_OF = "vllm.v1.sample.rejection_sampler"


def mend_sampling(runner: Any) -> None:
    """From here on this process verifies drafts of sampled requests.

    Args:
        runner: vLLM's V1 model runner on a CPU, with its samplers.
    """
    mend_kernels()
    stock = runner.rejection_sampler
    runner.rejection_sampler = VerifyingSampler(
        stock.sampler, runner.speculative_config, runner.device
    )


def mend_kernels() -> None:
    """Registers ``expand`` and ``keep_or_replace`` in this process."""
    register_kernels(
        {
            f"{KERNELS_OF}.expand_kernel": expand,
            f"{KERNELS_OF}.rejection_random_sample_kernel": keep_or_replace,
        }
    )


class VerifyingSampler(RejectionSampler):
    """vLLM's, where batches may have no draft, and rows drafts that are none (-1)."""

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """See ``RejectionSampler.forward``."""
        if not len(metadata.draft_token_ids):
            output: SamplerOutput = self.sampler(logits=logits, sampling_metadata=sampling_metadata)
            return output
        absent = metadata.draft_token_ids < 0
        if draft_probs is not None and bool(absent.any()):
            # Nothing was drawn from them: what comes in its place is drawn from the model's own.
            draft_probs = draft_probs.masked_fill(absent[:, None], 0.0)
        return super().forward(metadata, draft_probs, logits, sampling_metadata)


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    max_num_tokens: int | None = None,
) -> None:
    """Each request's value, once per token of it; arguments as ``expand_kernel`` of vLLM has them.

    Args:
        output: ``[num_tokens]``, of the values' type; written.
        values: ``[num_reqs]``.
        cu_num_tokens: ``[num_reqs]``, tokens of the requests up to each, it included.
        replace_from: a value that becomes ``replace_to``.
        replace_to: see ``replace_from``.
        max_num_tokens: unused; a bound for kernels.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)).long()
    replaced = torch.where(values == replace_from, replace_to, values).to(output.dtype)
    output.copy_(replaced.repeat_interleave(counts, output_size=len(output)))


def keep_or_replace(
    output_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    draft_token_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    recovered_token_ids: torch.Tensor,
    uniform_probs: torch.Tensor,
    *others: Any,
    **options: Any,
) -> None:
    """vLLM's ``rejection_random_sample_kernel``; drafts that are none (-1) are never kept."""
    absent = draft_token_ids < 0
    cpu_triton_utils._rejection_random_sample_kernel_impl(
        output_token_ids,
        cu_num_draft_tokens,
        draft_token_ids.clamp_min(0),
        draft_probs,
        target_probs,
        bonus_token_ids,
        recovered_token_ids,
        uniform_probs.masked_fill(absent, torch.inf),
        *others,
        **options,
    )
