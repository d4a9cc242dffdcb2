"""FLUX's calibration: splits without padding, routers and their file, the verdict, a tiny run."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attn_backends.head_classes import num_groups, padded_entries
from attn_backends.methods.flux import FluxSection
from attn_backends.profile import load_profile
from kvcache.spans import Span
from vllm_ext.calibration import flux_report
from vllm_ext.calibration.flux import Calibration, FluxSettings, Found
from vllm_ext.calibration.flux_section import decided, flux_profile
from vllm_ext.calibration.flux_tables import with_lazy
from vllm_ext.calibration.joint_routing import Depths, fit_depths
from vllm_ext.calibration.layer_splits import splits, static_layers, unit_layers
from vllm_ext.calibration.routed import RoutedModel
from vllm_ext.calibration.routed_prompts import RoutedPrompt, make_prompts
from vllm_ext.calibration.routers import (
    FAR_KL,
    RETRIEVAL,
    RETRIEVAL_WEIGHT,
    Measured,
    RouterFits,
)
from vllm_ext.calibration.routing_fit import prefix_masks
from vllm_ext.calibration.routing_outcomes import Variants
from vllm_ext.calibration.state import SavedState
from vllm_ext.cli.calibrating import write_profile

LAYERS, KV_HEADS = 4, 2


@pytest.mark.parametrize(("num_layers", "unit"), [(30, 5), (32, 4), (28, 4), (36, 6), (6, 1)])
def test_no_part_of_a_split_is_padded(num_layers: int, unit: int) -> None:
    assert unit_layers(num_layers) == unit
    for share in (0.3, 0.5):
        known = list(splits(num_layers, share))
        assert known
        for split in known:
            first, last = split.numbers()[0], split.numbers()[-1]
            parts = [first, *split.sizes, num_layers - last]
            assert padded_entries(parts) == 0
            assert num_groups(parts) <= 8
            assert 0 < first < share * num_layers < last < num_layers
        static = static_layers(num_layers, share)
        assert padded_entries([static, num_layers - static]) == 0
        assert static <= share * num_layers
    assert static_layers(30, 0.4) == 10


def test_layers_in_two_groups_at_most_are_not_routed() -> None:
    assert list(splits(22, 0.4)) == []
    assert static_layers(22, 0.4) == 2


def _measured(seed: int, number: int = 60) -> Measured:
    """Prompts that need layers 0 to 2 where head 1 of layer 3 looks back, and layer 0 otherwise."""
    chance = np.random.default_rng(seed)
    gap = chance.uniform(0, 1, (number, LAYERS, KV_HEADS))
    needs = gap[:, 3, 1] > 0.6
    kl = np.tile([0.06, 0.01, 0.005, 0.002, 0.0], (number, 1))
    kl[needs, :3] += 0.5
    hits = np.full_like(kl, np.nan)
    variants = Variants(prefix_masks(range(LAYERS)), kl, np.ones_like(kl), hits)
    kinds = np.arange(number) % 3
    num_tokens = chance.integers(900, 4000, number)
    return Measured(kinds, num_tokens, gap, tuple(range(LAYERS + 1)), variants)


@cache
def _found(share: float = 0.5) -> Found:
    fitted, held_out = _measured(0), _measured(1)
    fits = RouterFits(fitted, share, 0).best()
    none = np.zeros((0, LAYERS), bool)
    masks = with_lazy(none, held_out.gap[..., 0], np.array([0.5, 0.2]))
    kl = np.ones((len(held_out.gap), 2))
    return Found(list(range(LAYERS)), fits, fitted, held_out, Variants(masks, kl, kl, kl))


def test_routers_send_those_that_need_it_deep() -> None:
    found = _found()
    needs = found.held_out.gap[:, 3, 1] > 0.6
    assert {fit.kind for fit in found.fits} == {"joint", "logistic"}
    assert found.fits[0].loss <= found.fits[1].loss
    deep = np.array(found.fits[0].split.numbers())[found.depths] >= 3
    assert (deep == needs).mean() > 0.9
    assert found.routed.share.mean() == pytest.approx(0.5, abs=0.1)
    assert found.static.share.mean() == pytest.approx(found.routed.share.mean())
    assert found.routed.kl.mean() < 0.5 * found.static.kl.mean()


def test_a_depth_that_costs_too_much_is_not_bought() -> None:
    features = np.random.default_rng(0).normal(size=(60, 3))
    kl = np.stack([np.where(features[:, 1] > 0, 0.1, 0.0), np.zeros(60)], 1)
    kept = np.ones((2, 60), bool)
    kept[0, ::2] = False
    weights, bias = fit_depths(features, Depths(kl, np.array([0.2, 0.6]), 0.4), kept, 0.001)
    assert weights.shape == (2, 3, 1)
    for fit in range(2):
        is_full = features @ weights[fit, :, 0] + bias[fit, 0] > 0
        assert (is_full == (features[:, 1] > 0)).mean() > 0.8


def test_a_divergence_costs_more_where_a_key_is_asked_for() -> None:
    found = _found().held_out
    kl = np.full_like(found.variants.kl, 0.02)
    hits = np.full_like(kl, np.nan)
    hits[found.kinds == RETRIEVAL] = 1
    hits[RETRIEVAL, 0] = 0  # the first layers alone lose this prompt's key
    found = replace(found, variants=replace(found.variants, kl=kl, hits=hits))
    lost, kept, plain = found.costs([0, LAYERS])[[RETRIEVAL, RETRIEVAL + 3, RETRIEVAL + 1], 0]
    assert kept == pytest.approx(RETRIEVAL_WEIGHT * plain)
    assert lost == pytest.approx(kept + RETRIEVAL_WEIGHT * FAR_KL)
    outcome = found.variants.pick(np.zeros(60, int))
    assert found.costs_of(outcome) == pytest.approx(found.costs([0])[:, 0])


def test_the_file_says_what_was_fitted(tmp_path: Path) -> None:
    from safetensors.numpy import load

    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": KV_HEADS}))
    settings, found = FluxSettings(tmp_path, 0.5), _found()
    decision = decided(found, "auto")
    assert decision.is_routed
    assert "is shown to be better" in decision.reason
    profile = flux_profile(settings, found, decision, tmp_path / "p.flux.safetensors")
    write_profile(profile, tmp_path / "p.json")
    section = load_profile(tmp_path / "p.json").section("FLUX", FluxSection)
    content = (tmp_path / "p.flux.safetensors").read_bytes()
    assert section.router_file == "p.flux.safetensors"
    assert section.router_sha256 == hashlib.sha256(content).hexdigest()
    tensors = load(content)
    assert tensors["weights"].shape == (len(section.routed_groups), LAYERS, KV_HEADS)
    for row in range(0, 60, 7):
        depth = 0
        mass, length = found.held_out.gap[row], np.log(found.held_out.num_tokens[row])
        for group in range(len(section.routed_groups)):
            score = (tensors["weights"][group] * mass).sum() + tensors["bias"][group]
            if score + tensors["log_tokens"][group] * length <= 0:
                break
            depth += 1
        assert depth == found.depths[row]
    report = flux_report.markdown("m", settings, found, decision, None)
    assert "**In the profile: routes by request.**" in report
    assert "lazy test, at the router's share" in report


def test_static_layers_are_served_where_routes_are_no_better(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": KV_HEADS}))
    found = _found()
    assert not decided(found, "never").is_routed
    same = np.tile(np.linspace(0.1, 0, LAYERS + 1), (60, 1))  # all need the same
    variants = replace(found.held_out.variants, kl=same)
    found = replace(found, held_out=replace(found.held_out, variants=variants))
    decision = decided(found, "auto")
    assert not decision.is_routed
    assert "not shown to be better" in decision.reason
    profile = flux_profile(FluxSettings(tmp_path, 0.5), found, decision, tmp_path / "r.safetensors")
    assert not (tmp_path / "r.safetensors").exists()
    assert profile.section("FLUX", FluxSection).full_layers == [0, 1]


class _Letters:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = 0
    chat_template = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def batch_decode(self, rows: torch.Tensor) -> list[str]:
        return [self.decode(row) for row in rows.tolist()]


class _TinyCalibration(Calibration):
    """Of a random Llama, with bytes for tokens."""

    def __init__(self, settings: FluxSettings, state: SavedState, model: RoutedModel | None):
        super().__init__(settings, state, self._others, lambda line: None, lambda *args: None)
        vars(self)["_tokenizer"] = _Letters()
        if model is not None:
            vars(self)["_model"] = model

    @staticmethod
    def _others(tokenizer: Any, number: int, lengths_tokens: Any) -> list[RoutedPrompt]:
        text = list(b"some other text ") * 40
        return make_prompts(tokenizer, random.Random(9), [text], lengths_tokens, number)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[FluxSettings, RoutedModel]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=8,
        vocab_size=256,
        initializer_range=0.3,
        max_position_embeddings=1024,
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("So it was written, and so it was read again. " * 20)
    settings = FluxSettings(
        tmp_path, 0.4, 200, 15, 3, 6, sink_tokens=4, window_tokens=16, corpus=tmp_path / "text.txt"
    )
    return settings, RoutedModel(LlamaForCausalLM(config), Span(4, 16))


def test_a_tiny_model_is_calibrated_and_goes_on_where_it_was(
    tiny: tuple[FluxSettings, RoutedModel], tmp_path: Path
) -> None:
    settings, model = tiny
    state = SavedState(tmp_path / "state.json", settings.key())
    found = _TinyCalibration(settings, state, model).run()
    assert sorted(found.order) == list(range(LAYERS))
    assert len(found.held_out.kinds) == 6
    assert float(np.abs(found.held_out.variants.kl[:, -1]).max()) < 1e-5  # all layers full
    assert found.held_out.variants.kl[:, 0].mean() > found.held_out.variants.kl[:, -2].mean()
    assert found.fitted.gap.shape == (15, LAYERS, KV_HEADS)
    # Without a model: all is known, whatever the share.
    known = SavedState(tmp_path / "state.json", settings.key())
    again = _TinyCalibration(settings, known, None).run()
    assert again.order == found.order
    np.testing.assert_array_equal(again.depths, found.depths)
    np.testing.assert_array_equal(again.routed.kl, found.routed.kl)
