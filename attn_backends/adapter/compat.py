"""What stock vLLM does wrong and our workers avoid; each entry goes when vLLM's fault does.

Nothing of vLLM is replaced: our workers call these around their own ``super()`` calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
