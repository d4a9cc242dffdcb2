"""Faults of stock vLLM that our workers avoid; a test fails where one is no longer there."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.utils import cpu_triton_utils
from vllm.v1.sample import rejection_sampler
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from attn_backends.adapter.compat import expand, mend_expansion, unseeded_chunks

EXPANDED = [
    pytest.param(torch.tensor([0.7, 0.0, 1.3]), [0.7, 0.7, 1.0, 1.3], id="temperature"),
    pytest.param(torch.tensor([7, 0, 11], dtype=torch.int32), [7, 7, 1, 11], id="top_k"),
]


def test_vllm_still_sets_generators_back_that_cannot_be() -> None:
    """Fails when ``unseeded_chunks`` is no longer needed: then remove it."""
    assert "set_offset(" in inspect.getsource(CPUModelRunner._bookkeeping_sync)
    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator(device="cpu").get_offset()


def test_a_row_whose_prompt_goes_on_has_no_generator_meanwhile() -> None:
    generators: dict[int, Any] = {0: "a", 2: "c"}
    goes_on = numpy.array([True, True, False, True, True, True])
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(num_reqs=3, generators=generators),
        discard_request_mask=SimpleNamespace(np=goes_on),
    )
    with unseeded_chunks(runner):
        assert generators == {2: "c"}
    assert generators == {0: "a", 2: "c"}


def _expanded(by: Any, values: torch.Tensor) -> list[float]:
    """Of requests with two, one and one token, into what looks like no parameter."""
    output = torch.full((4,), 99, dtype=values.dtype)
    by(output, values, torch.tensor([2, 3, 4], dtype=torch.int32), 0, 1)
    return output.tolist()


@pytest.mark.parametrize(("values", "want"), EXPANDED)
def test_each_token_has_its_request_s_parameter(values: torch.Tensor, want: list[float]) -> None:
    assert _expanded(expand, values) == pytest.approx(want)


@pytest.mark.parametrize(("values", "want"), EXPANDED)
def test_vllm_still_drops_what_it_expands(values: torch.Tensor, want: list[float]) -> None:
    """Fails when ``mend_expansion`` is no longer needed: then remove it."""
    if not current_platform.is_cpu():
        pytest.skip("a CPU kernel")
    current_platform.import_kernels()
    assert _expanded(cpu_triton_utils._expand_kernel_impl, values) == [99] * 4


NUM_DRAFTS, NUM_ROWS, VOCABULARY = 3, 20_000, 12
BONUS = VOCABULARY - 1


@pytest.fixture
def mended_sampler() -> None:
    """vLLM's rejection sampler as our worker leaves it, for the rest of this process."""
    if not current_platform.is_cpu():
        pytest.skip("vLLM's kernels for CPUs")
    current_platform.import_kernels()
    if not isinstance(rejection_sampler.expand_kernel, KernelOverride):
        current_platform.register_triton_kernel_overrides()
    mend_expansion()


@pytest.mark.usefixtures("mended_sampler")
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "greedy_beside"),
    [(1.0, None, None, False), (0.7, 5, None, False), (1.3, None, 0.8, False), (0.7, 5, 0.9, True)],
)
def test_verified_tokens_have_the_model_s_distribution(
    temperature: float, top_k: int | None, top_p: float | None, greedy_beside: bool
) -> None:
    """vLLM's own kernels once they get their parameters: chi-square by position, drafts sampled
    from another distribution, every other request greedy where ``greedy_beside``.
    """
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    model = 1.5 * torch.randn(NUM_DRAFTS, VOCABULARY)
    drafter = ((model + torch.randn_like(model)) / temperature).softmax(-1)
    drafts = torch.multinomial(drafter, NUM_ROWS, replacement=True).T.int().contiguous()
    temperatures = torch.full((NUM_ROWS,), temperature)
    if greedy_beside:
        temperatures[::2] = 0
    sampling: Any = SimpleNamespace(
        all_greedy=False,
        all_random=not greedy_beside,
        temperature=temperatures,
        top_k=None if top_k is None else torch.full((NUM_ROWS,), top_k, dtype=torch.int32),
        top_p=None if top_p is None else torch.full((NUM_ROWS,), top_p),
        generators={},
    )
    ends = NUM_DRAFTS * torch.arange(1, NUM_ROWS + 1, dtype=torch.int32)
    logits = rejection_sampler.apply_sampling_constraints(model.repeat(NUM_ROWS, 1), ends, sampling)
    want = logits[-NUM_DRAFTS:].softmax(-1)
    got = rejection_sampler.rejection_sample(
        drafts.flatten(),
        [NUM_DRAFTS] * NUM_ROWS,
        NUM_DRAFTS,
        ends,
        drafter.repeat(NUM_ROWS, 1),
        logits,
        torch.full((NUM_ROWS, 1), BONUS, dtype=torch.int32),
        sampling,
    )[1::2]
    for place in range(NUM_DRAFTS):
        reached = got[:, place][got[:, place] >= 0].long()
        counts = torch.bincount(reached, minlength=VOCABULARY)
        allowed = want[place] > 0
        assert int(counts[~allowed].sum()) == 0
        foreseen = want[place][allowed].double()
        foreseen *= len(reached) / foreseen.sum()
        assert stats.chisquare(counts[allowed].double(), foreseen).pvalue > 1e-4
