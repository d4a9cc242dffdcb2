"""Sampled drafts are verified to the model's distribution; tests fail where vLLM does so itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.utils import cpu_triton_utils
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from attn_backends.adapter.compat_sampling import VerifyingSampler, expand, mend_kernels

EXPANDED = [
    pytest.param(torch.tensor([0.7, 0.0, 1.3]), [0.7, 0.7, 1.0, 1.3], id="temperature"),
    pytest.param(torch.tensor([7, 0, 11], dtype=torch.int32), [7, 7, 1, 11], id="top_k"),
]


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
    """Fails when ``expand`` is no longer needed: then remove it."""
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
    mend_kernels()


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


@pytest.mark.usefixtures("mended_sampler")
@pytest.mark.parametrize("has_probs", [False, True])
def test_drafts_that_are_none_are_not_kept(has_probs: bool) -> None:
    """One row in three has them, for all its drafts: its first token is the model's, and the last.

    Where that fails without ``keep_or_replace`` vLLM read another token's probability.
    """
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    model = 1.5 * torch.randn(VOCABULARY)
    drafter = torch.rand(VOCABULARY).softmax(-1)
    num_tokens = NUM_DRAFTS * NUM_ROWS
    drafts = torch.multinomial(drafter, num_tokens, replacement=True).int().view(NUM_ROWS, -1)
    drafts[::3] = -1
    sampler = VerifyingSampler.__new__(VerifyingSampler)
    torch.nn.Module.__init__(sampler)
    verified: list[torch.Tensor] = []
    sampling: Any = SimpleNamespace(
        all_greedy=False,
        all_random=True,
        temperature=torch.ones(NUM_ROWS),
        top_k=None,
        top_p=None,
        generators={},
    )

    def sample(self: Any, metadata: Any, probs: torch.Tensor | None, *others: Any) -> None:
        ends = NUM_DRAFTS * torch.arange(1, NUM_ROWS + 1, dtype=torch.int32)
        bonus = torch.full((NUM_ROWS, 1), BONUS, dtype=torch.int32)
        logits = model.repeat(num_tokens, 1)
        verified.append(
            rejection_sampler.rejection_sample(
                metadata.draft_token_ids,
                [NUM_DRAFTS] * NUM_ROWS,
                NUM_DRAFTS,
                ends,
                probs,
                logits,
                bonus,
                sampling,
            )
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rejection_sampler.RejectionSampler, "forward", sample)
        metadata: Any = SimpleNamespace(draft_token_ids=drafts.flatten())
        probs = drafter.repeat(num_tokens, 1) if has_probs else None
        sampler.forward(metadata, probs, torch.empty(0), sampling)
    got = verified[0][::3]
    assert int((got[:, 1:] >= 0).sum()) == 0
    counts = torch.bincount(got[:, 0].long(), minlength=VOCABULARY).double()
    foreseen = model.softmax(-1).double()
    assert stats.chisquare(counts, foreseen * len(got) / foreseen.sum()).pvalue > 1e-4


def test_vllm_still_keeps_a_draft_that_is_none() -> None:
    """Fails when ``keep_or_replace`` is no longer needed: then remove it."""
    if not current_platform.is_cpu():
        pytest.skip("a CPU kernel")
    current_platform.import_kernels()
    output = torch.full((2, 2), -1, dtype=torch.int32)
    target = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # of the token before: certain
    cpu_triton_utils._rejection_random_sample_kernel_impl(
        output,
        torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([1, -1], dtype=torch.int32),
        None,
        target,
        torch.zeros(2, 1, dtype=torch.int32),
        torch.tensor([0, 0], dtype=torch.int32),
        torch.full((2,), 0.5, dtype=torch.float64),
        torch.zeros(2, dtype=torch.bool),
        1,
        2,
        NO_DRAFT_PROBS=True,
    )
    assert output[1].tolist() == [-1, 0]  # kept, and the bonus behind it; right is [0, -1]


def test_a_batch_without_drafts_is_sampled_as_stock_does() -> None:
    """And vLLM's ``top_k`` still ends the engine there: else remove that from ``forward``."""
    asked: list[Any] = []
    sampler = VerifyingSampler.__new__(VerifyingSampler)
    torch.nn.Module.__init__(sampler)
    sampler.__dict__["sampler"] = lambda **of: asked.append(of) or "sampled"
    metadata: Any = SimpleNamespace(draft_token_ids=torch.empty(0, dtype=torch.int32))
    logits, sampling = torch.empty(2, 5), SimpleNamespace()
    assert sampler.forward(metadata, None, logits, sampling) == "sampled"  # type: ignore[arg-type]
    assert asked == [{"logits": logits, "sampling_metadata": sampling}]
    with pytest.raises(RuntimeError, match="numel"):
        apply_top_k_top_p(torch.empty(0, 5), torch.empty(0, dtype=torch.int32), None)
