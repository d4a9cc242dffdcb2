"""What stock vLLM does wrong and our workers avoid; each entry goes when vLLM's fault does.

Our workers call these around their own ``super()`` calls; what is replaced has a hook for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.triton_utils.dispatcher import register_kernels

EXPANSION = "vllm.v1.sample.rejection_sampler.expand_kernel"


@contextmanager
def unseeded_chunks(runner: Any) -> Iterator[None]:
    """While it lasts, requests in the middle of their prompt have no random generator.

    What: a V1 model runner samples a token for every row, drops those of rows whose prompt goes
        on, and sets such a row's generator back by ``set_offset(get_offset() - 4)``.
    Why: generators of the CPU have no offset: ``RuntimeError: CPU Generator does not use offset``
        ends the engine as soon as a seeded prompt takes more than one chunk. Without its
        generator the dropped token is drawn unseeded, and there is nothing to set back: a
        request's draws are the same however its prompt is chunked, and whatever runs beside it.
    Upstream: ``GPUModelRunner._bookkeeping_sync`` of vllm-project/vllm, v0.32.0
        (vllm/v1/worker/gpu_model_runner.py); CPUModelRunner inherits it.
    Remove when: it no longer calls ``set_offset``, or CPU generators have one
        (tests/adapter/test_compat.py fails then).

    Args:
        runner: between its ``execute_model`` and its ``sample_tokens``. A V2 runner, which has no
            ``input_batch`` and draws by itself, is left alone.
    """
    if not hasattr(runner, "input_batch"):
        yield
        return
    batch = runner.input_batch
    goes_on = runner.discard_request_mask.np[: batch.num_reqs]
    held = {row: batch.generators[row] for row in list(batch.generators) if goes_on[row]}
    for row in held:
        del batch.generators[row]  # the sampling metadata has the same dictionary
    try:
        yield
    finally:
        batch.generators.update(held)


def mend_expansion() -> None:
    """From here on this process verifies each draft with its request's sampling parameters.

    What: registers ``expand`` for a kernel of vLLM's rejection sampler, by vLLM's hook for that
        (which warns that another one was registered).
    Why: what vLLM has for CPUs writes whole numbers into a copy of the output and drops it, so
        that temperature, ``top_k`` and ``top_p`` of verified tokens are whatever was in memory:
        sampled answers of other distributions than the model's, or the end of the engine.
    Upstream: ``_expand_kernel_impl`` (vllm/utils/cpu_triton_utils.py) of v0.32.0;
        https://github.com/vllm-project/vllm/issues/55005 and its pull request 55006.
    Remove when: it writes its output in the output's own type (tests/adapter/test_compat.py fails
        then).
    """
    register_kernels({EXPANSION: expand})


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
