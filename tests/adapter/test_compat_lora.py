"""Adapters on CPU: base rows are left alone, prompt tokens of one request are served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from attn_backends.adapter.compat_lora import ExtPunicaWrapperCPU, with_adapters

RANK, HIDDEN, OUT = 4, 6, 10
ADAPTER = 7  # its id; it is in slot 0, the only and so the last one


def _mapped(wrapper_cls: Any, prompts: tuple[int, ...], tokens: tuple[int, ...]) -> Any:
    wrapper = wrapper_cls(max_num_batched_tokens=64, max_batches=8, device="cpu")
    wrapper.update_metadata(LoRAMapping(tokens, prompts, is_prefill=True), [ADAPTER], 2, OUT)
    return wrapper


def _factors() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    down = torch.randn(1, 1, RANK, HIDDEN, generator=draw)
    return down, torch.randn(1, 1, OUT, RANK, generator=draw)


def _linear(wrapper_cls: Any, tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    down, up = _factors()
    x = torch.randn(len(tokens), HIDDEN, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(len(tokens), OUT)
    wrapper = _mapped(wrapper_cls, tokens, tokens)
    wrapper.add_lora_linear(y, x, (down,), (up,), 1.0, (OUT,))
    return y, x @ down[0, 0].T @ up[0, 0].T


def _logits(wrapper_cls: Any, prompts: tuple[int, ...], num_rows: int) -> torch.Tensor:
    down, up = _factors()
    y = torch.zeros(num_rows, OUT)
    wrapper = _mapped(wrapper_cls, prompts, prompts)
    wrapper.add_lora_logits(y, torch.ones(num_rows, HIDDEN), down, up, 1.0)
    return y


@pytest.mark.parametrize("tokens", [(ADAPTER, 0, 0), (0, ADAPTER, ADAPTER), (0, ADAPTER, 0)])
def test_rows_of_the_base_model_are_left_alone(tokens: tuple[int, ...]) -> None:
    got, of_adapter = _linear(ExtPunicaWrapperCPU, tokens)
    is_adapter = torch.tensor(tokens) > 0
    torch.testing.assert_close(got[is_adapter], of_adapter[is_adapter])
    assert not got[~is_adapter].any()


def test_embeddings_of_the_base_model_are_left_alone() -> None:
    wrapper = _mapped(ExtPunicaWrapperCPU, (ADAPTER, 0), (ADAPTER, 0))
    y = torch.zeros(2, OUT)
    wrapper.add_lora_embedding(y, torch.ones(2, RANK), _factors()[1])
    assert y[0].any()
    assert not y[1].any()


def test_logits_of_the_base_model_are_left_alone() -> None:
    got = _logits(ExtPunicaWrapperCPU, (ADAPTER, 0, ADAPTER), 3)
    assert got[0].any()
    torch.testing.assert_close(got[0], got[2])
    assert not got[1].any()
    assert not _logits(ExtPunicaWrapperCPU, (0,), 5).any()


def test_prompt_tokens_of_one_request_get_its_adapter() -> None:
    got = _logits(ExtPunicaWrapperCPU, (ADAPTER,), 5)
    torch.testing.assert_close(got, _logits(ExtPunicaWrapperCPU, (ADAPTER,), 1).expand(5, -1))


def test_rows_of_anyone_are_served_where_no_adapter_changes_the_output_layer() -> None:
    down, up = _factors()
    wrapper = _mapped(ExtPunicaWrapperCPU, (ADAPTER, 0), (ADAPTER, 0))
    y = torch.zeros(5, OUT)
    wrapper.add_lora_logits(y, torch.ones(5, HIDDEN), down * 0, up * 0, 1.0)
    assert not y.any()


def test_prompt_logprobs_are_asked_for_one_request_with_its_adapter() -> None:
    asked: list[Any] = []

    class Stock:
        def _get_prompt_logprobs_dict(self: Any, hidden: Any, scheduled: Any) -> dict[str, Any]:
            asked.append((self.active, dict(self.num_prompt_logprobs)))
            for name in [*self.num_prompt_logprobs]:
                if name == "done":
                    del self.num_prompt_logprobs[name]
            return dict.fromkeys(self.num_prompt_logprobs, "scores")

    runner: Any = Stock()
    runner.num_prompt_logprobs = {"done": 1, "adapted": 2, "waits": 3}
    runner.input_batch = SimpleNamespace(
        request_lora_mapping=[0, ADAPTER],
        req_id_to_index={"done": 0, "adapted": 1},
        lora_id_to_lora_request={ADAPTER: "its request"},
    )
    runner._set_active_loras = lambda *mapped: setattr(runner, "active", mapped)
    with_adapters(runner)
    found = runner._get_prompt_logprobs_dict(torch.zeros(1), {"done": 4, "adapted": 4})
    assert asked == [
        (((0,), (0,), {"its request"}), {"done": 1}),
        (((ADAPTER,), (ADAPTER,), {"its request"}), {"adapted": 2}),
    ]
    assert found == {"adapted": "scores"}
    assert runner.num_prompt_logprobs == {"adapted": 2, "waits": 3}


def test_vllm_still_gives_adapters_to_rows_without_one() -> None:
    """Fails when ``ExtPunicaWrapperCPU`` is no longer needed: then remove it."""
    got, _ = _linear(PunicaWrapperCPU, (ADAPTER, 0))
    assert got[1].any(), "stock leaves rows of the base model alone now"


def test_vllm_still_mistakes_prompt_tokens_for_requests() -> None:
    """Fails when ``PromptLogprobsPerAdapter`` is no longer needed: then remove it."""
    with pytest.raises(RuntimeError, match="subscript b"):
        _logits(PunicaWrapperCPU, (ADAPTER, 0), 5)
