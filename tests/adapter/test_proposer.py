"""The drafter of lossless mode, told of steps that no engine made."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from attn_backends.adapter import proposer
from attn_backends.adapter.proposer import SelfProposer
from attn_backends.adapter.speculation import require_own_drafter
from attn_backends.adapter.speculator import SelfSpeculator

BLOCK = 32
LENGTHS = [70, 40, 95]  # with the tokens that were rejected


@dataclass
class _Sampling:
    temperature: torch.Tensor


class _Drafter:
    """A ``SelfProposer`` with a model that counts: the token after n is n + 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, narrowed: list[int], probs: bool) -> None:
        self.asked: list[Any] = []
        self.slots: list[list[int]] = []
        self.own: Any = SelfProposer.__new__(SelfProposer)
        reads_prompt = numpy.array([False, True, False])
        self.own._runner = SimpleNamespace(discard_request_mask=SimpleNamespace(np=reads_prompt))
        self.own._builder = SimpleNamespace(
            kv_cache_spec=SimpleNamespace(block_size=BLOCK), build_for_drafting=self._build
        )
        self.own._layer_names, self.own.vllm_config = ["layer"], None
        self.own.__dict__["model"] = lambda input_ids, positions: input_ids
        self.own._sample_draft_tokens = self._sample
        self._narrowed, self._probs = narrowed, probs
        monkeypatch.setattr(proposer, "set_forward_context", self._context)

    def _build(self, common: Any, index: int) -> Any:
        self.asked.append((index, common.seq_lens.tolist(), common.req_idx.tolist()))
        return SimpleNamespace(plan=SimpleNamespace(narrowed_rows=self._narrowed))

    @contextmanager
    def _context(
        self, metadata: Any, vllm_config: Any, *, num_tokens: int, slot_mapping: Any
    ) -> Any:
        self.slots.append(slot_mapping["layer"].tolist())
        assert num_tokens == len(self.slots[-1])
        yield

    def _sample(self, hidden: torch.Tensor, sampling: Any) -> Any:
        probs = torch.full((len(hidden), 5), float(sampling.temperature[1]))
        return hidden + 1, probs if self._probs else None

    def propose(self) -> list[list[int]]:
        """Three drafts behind tokens 10, 20 and 30."""
        return self.own.propose(
            3,
            next_token_ids=torch.tensor([10, 20, 30], dtype=torch.int32),
            common_attn_metadata=SimpleNamespace(
                num_reqs=3,
                seq_lens=torch.tensor(LENGTHS, dtype=torch.int32),
                block_table_tensor=torch.arange(12, dtype=torch.int32).view(3, 4),
            ),
            sampling_metadata=_Sampling(torch.tensor([0.5, 0.7, 0.9])),
            num_rejected_tokens_gpu=torch.tensor([2, 0, 0], dtype=torch.int32),
            target_token_ids=None,
        )


def test_rows_that_read_their_prompt_do_not_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = _Drafter(monkeypatch, narrowed=[0], probs=True)
    assert drafter.propose() == [[11, 12, 13], [], [31, 32, 33]]
    # Behind the verified tokens, those that were rejected among them are written over.
    assert drafter.asked == [
        (0, [69, 96], [0, 2]),
        (1, [70, 97], [0, 2]),
        (2, [71, 98], [0, 2]),
    ]
    third_row = [(8 + position // BLOCK) * BLOCK + position % BLOCK for position in (95, 96, 97)]
    assert drafter.slots == [[68, third_row[0]], [69, third_row[1]], [70, third_row[2]]]
    # By the batch's rows, each with its own temperature.
    probs = drafter.own.take_last_draft_probs()
    assert probs.shape == (3, 3, 5)
    assert probs[:, 0, 0].tolist() == pytest.approx([0.9, 0.0, 0.9])


def test_a_batch_that_would_leave_nothing_out_does_not_draft(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafter = _Drafter(monkeypatch, narrowed=[], probs=True)
    assert drafter.propose() == [[], [], []]
    assert len(drafter.asked) == 1
    assert drafter.slots == []
    assert drafter.own.take_last_draft_probs() is None


def test_vllm_asks_as_this_release_does() -> None:
    """What ``SelfProposer.propose`` takes of it stands in the signature that vLLM calls."""
    asked = inspect.signature(DraftModelProposer.propose).parameters
    ours = inspect.signature(SelfProposer.propose).parameters
    named = [name for name, one in ours.items() if one.kind is not one.VAR_KEYWORD]
    assert set(named) <= set(asked)
    for name in ("load_model", "initialize_attn_backend", "dummy_run", "_sample_draft_tokens"):
        assert callable(getattr(DraftModelProposer, name))


def test_another_drafter_ends_the_start() -> None:
    model = torch.nn.Identity()
    own: Any = SelfProposer.__new__(SelfProposer)
    own.__dict__["model"] = model
    require_own_drafter(own, model)
    for drafter, served in ((own, torch.nn.Identity()), (object(), model)):
        with pytest.raises(RuntimeError, match="not with the served model"):
            require_own_drafter(drafter, served)


def test_the_other_runner_asks_as_this_release_does() -> None:
    """The same of ``SelfSpeculator`` on V2."""
    asked = inspect.signature(DraftModelSpeculator.propose).parameters
    ours = inspect.signature(SelfSpeculator.propose).parameters
    assert {name for name, one in ours.items() if one.kind is not one.VAR_KEYWORD} <= set(asked)
    for name in ("load_draft_model", "set_attn", "init_cudagraph_manager", "capture"):
        theirs = inspect.signature(getattr(DraftModelSpeculator, name)).parameters
        assert list(inspect.signature(getattr(SelfSpeculator, name)).parameters) == list(theirs)
