"""Sinks and layer similarities against plain readings of their definitions, on tiny Llamas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_backends.config import ConfigError
from attn_backends.findings import Findings
from attn_backends.methods.sink_window import WindowSection
from attn_backends.methods.tidal_decode import AnchorSection
from attn_backends.plan import LayerRole, LayerSchedule
from attn_backends.profile import Profile, load_profile
from vllm_ext.calibration import report
from vllm_ext.calibration.data import Example
from vllm_ext.calibration.layer_similarity import least_important
from vllm_ext.calibration.probe import Budget, Probe
from vllm_ext.calibration.search import Recording, findings, make_schedule, record, verify
from vllm_ext.calibration.search import without_layers as dropping
from vllm_ext.calibration.sinks import (
    EPSILON,
    SPAN_TOKENS,
    PromptSinks,
    off_reason,
    secondary_mass,
    secondary_sinks,
    summarize,
)
from vllm_ext.cli import main

NUM_LAYERS, FORCED_TOKENS, NUM_TOKENS = 4, 6, 150


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe(Budget(block_size=16, budget_blocks=100, sink_blocks=1, recent_blocks=1))


@pytest.fixture(scope="module")
def model(probe: Probe) -> Any:
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    AttentionInterface.register("vllm_ext_probe_findings", probe.attend)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=97,
        initializer_range=0.3,
        attn_implementation="vllm_ext_probe_findings",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def recording(model: Any, probe: Probe) -> Recording:
    source = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 97, (NUM_TOKENS,), generator=source).tolist()
    return record(model, probe, Example("text", ids, FORCED_TOKENS))


@pytest.fixture(scope="module")
def eager(model: Any, recording: Recording) -> Any:
    """Attention weights and hidden states as transformers itself gives them."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.tensor([recording.example.ids[:-1]])
        output = model.model(input_ids=ids, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("vllm_ext_probe_findings")
    return output


def test_importance_is_that_of_the_definition(recording: Recording, eager: Any) -> None:
    assert recording.sinks is not None
    for layer, weights in enumerate(eager.attentions):
        for k in range(16):
            column = weights[0, :, k:SPAN_TOKENS, k]
            torch.testing.assert_close(
                recording.sinks.alpha[layer, :, k], column.mean(1), atol=1e-5, rtol=1e-4
            )


def test_a_token_is_a_sink_where_enough_heads_say_so(recording: Recording) -> None:
    assert recording.sinks is not None
    alpha = torch.zeros(NUM_LAYERS, 4, 16)
    alpha[:, :, 0] = 0.9
    alpha[2, 1, 3] = EPSILON + 0.01  # one head of 16
    sinks = summarize([PromptSinks(**(vars(recording.sinks) | {"alpha": alpha}))])
    assert sinks.sink_rate[:5] == [1.0, 0.0, 0.0, 0.0625, 0.0]
    assert sinks.needed_tokens == 4
    only_first = alpha.clone()
    only_first[2, 1, 3] = EPSILON - 0.01
    prompts = [
        PromptSinks(**(vars(recording.sinks) | {"alpha": measured}))
        for measured in (alpha, only_first, only_first)
    ]
    assert summarize(prompts).needed_tokens == 1


def test_masses_of_late_queries(recording: Recording, eager: Any) -> None:
    assert recording.sinks is not None
    num_keys = NUM_TOKENS - 1
    late = torch.linspace(num_keys // 2, num_keys - 1, 24).long()
    for layer, weights in enumerate(eager.attentions):
        expected = weights[0, :, late, :4].sum(-1).mean(1)
        torch.testing.assert_close(
            recording.sinks.first_mass[layer, :, 2], expected, atol=1e-5, rtol=1e-4
        )


def test_similarity_is_that_of_the_residual_stream(
    model: Any, recording: Recording, eager: Any
) -> None:
    layer = model.model.layers[0]
    with torch.no_grad():
        x = eager.hidden_states[0]
        positions = torch.arange(x.shape[1])[None]
        rope = model.model.rotary_emb(x, positions)
        attended = layer.self_attn(layer.input_layernorm(x), rope, None)[0]
        cosine = torch.cosine_similarity(x, x + attended, dim=-1).mean()
    assert recording.similarity[0] == pytest.approx(float(1 - cosine), abs=1e-5)
    assert len(recording.similarity) == NUM_LAYERS


def test_secondary_sinks_follow_the_first_token_long_enough() -> None:
    num_layers = 30
    cosine = torch.zeros(num_layers, 8)
    cosine[:, 0] = 1.0
    cosine[4:12, 3] = 0.97  # 8 layers: secondary
    cosine[3:28, 5] = -0.95  # 25 layers: as long as the first token
    cosine[4:8, 6] = 0.99  # 4 layers: too short
    cosine[10:13, 7] = cosine[20:23, 7] = 0.99  # 6 layers, but not in a row
    unused = torch.empty(0)
    attention = torch.full(cosine.shape, 0.25)
    prompt = PromptSinks(unused, unused, attention, unused, cosine)
    found = secondary_sinks(2, prompt)
    assert [(s.position, s.first_layer, s.last_layer, s.kind) for s in found] == [
        (3, 4, 11, "secondary"),
        (5, 3, 27, "bos"),
    ]
    assert found[0].prompt == 2
    assert found[0].attention == 0.25
    # 25 layers have a sink, 8 of them two.
    assert secondary_mass(prompt) == pytest.approx(0.25 * (25 + 8) / 25)


def test_models_that_need_no_sinks_are_left_alone(model: Any, recording: Recording) -> None:
    assert off_reason(model) == ""
    attention = model.model.layers[0].self_attn
    attention.sinks = torch.nn.Parameter(torch.zeros(4))
    assert "learned sinks" in off_reason(model)
    unlooked = Recording(**(vars(recording) | {"sinks": None}))
    found = findings(model, [unlooked])
    del attention.sinks
    assert found.sinks is None
    query, attention.q_proj = attention.q_proj, torch.nn.Linear(64, 128)
    assert "gates" in off_reason(model)
    attention.q_proj = query
    assert "learned sinks" in report.markdown(_profile(found), None)


def _profile(found: Findings | None, drop_layers: tuple[int, ...] = ()) -> Profile:
    settings = ("budget_tokens", "block_size", "context_tokens", "examples", "seed")
    profile = Profile(
        schema_version=2,
        fingerprint="0" * 64,
        model="tiny",
        num_layers=NUM_LAYERS,
        num_kv_heads=2,
        findings=found,
        calibration=dict.fromkeys(settings, 1) | {"held_out": {}, "verdicts": []},
    )
    schedule = LayerSchedule((LayerRole.DENSE, LayerRole.ANCHOR, *[LayerRole.REUSE] * 2))
    return profile.with_section("TIDAL_DECODE", AnchorSection.of(dropping(schedule, drop_layers)))


def test_findings_are_part_of_the_profile_and_of_the_report(
    model: Any, recording: Recording, tmp_path: Path
) -> None:
    found = findings(model, [recording, recording])
    assert found.sinks is not None
    assert found.sinks.prompts == 2
    profile = _profile(found, drop_layers=(3,))
    path = tmp_path / "profile.json"
    path.write_text(profile.model_dump_json())
    assert load_profile(path).findings == found
    text = report.markdown(profile, None)
    assert "First tokens that are sinks" in text
    assert "Dropped: [3]" in text
    assert "Windowed" not in text
    windowed = _profile(found).with_section("SINK_WINDOW", WindowSection(full_layers=[0, 1, 3]))
    assert "Windowed instead: [2]" in report.markdown(windowed, None)
    raw = json.loads(path.read_text())
    raw["findings"] = found.model_dump() | {"layer_similarity": [0.1]}
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="1 layers of 4"):
        load_profile(path)


def test_the_least_important_layers_are_chosen_among_the_free_ones() -> None:
    similarity = [0.01, 0.5, 0.2, 0.02, 0.3]
    assert least_important(similarity, {0}, 2) == [2, 3]
    assert least_important(similarity, {0}, 0) == []
    with pytest.raises(ValueError, match="4 of 5"):
        least_important(similarity, {0}, 5)


def test_a_dropped_layer_is_dropped_in_the_prompt_too(
    model: Any, probe: Probe, recording: Recording
) -> None:
    schedule = dropping(make_schedule((1,), recording.errors, first_layer=1), [2])
    assert schedule.dropped == (2,)
    assert 2 not in schedule.head_maps
    verdict = verify(model, probe, schedule, [recording])
    ids = torch.tensor([recording.example.ids[:-1]])
    handle = model.model.layers[2].self_attn.register_forward_hook(
        lambda module, args, output: (torch.zeros_like(output[0]), *output[1:])
    )
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -FORCED_TOKENS:].log_softmax(-1)
    handle.remove()
    dense = recording.logprobs
    divergence = float((dense.exp() * (dense - expected)).sum(-1).mean())
    assert divergence > 1e-3
    assert verdict.kl_text == pytest.approx(divergence, rel=1e-3)
    undropped = verify(model, probe, make_schedule((1,), recording.errors, 1), [recording])
    assert abs(undropped.kl_text) < 1e-5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--drop", "-1"], ["--drop", "at least 0"]),
        (["--window-instead"], ["--window-instead", "--drop"]),
    ],
)
def test_bad_flags_are_one_line(
    flags: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["profile", str(tmp_path), "--output", "p.json", *flags]) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    for word in words:
        assert word in message
