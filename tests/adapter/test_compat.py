"""Faults of stock vLLM that our workers avoid; a test fails where one is no longer there."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from attn_backends.adapter.compat import unseeded_chunks


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
