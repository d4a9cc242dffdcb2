"""Dropped layers: what vLLM is told while it decides about the KV cache, and what stays."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from attn_backends.adapter.dropping import unallocated
from attn_backends.adapter.impl import ExtAttentionImpl
from attn_backends.config import ConfigError
from attn_backends.plan import LayerRole, LayerSchedule
from tests.adapter.layers import attention_layer
from vllm_ext.platforms import selection

NUM_LAYERS, DROPPED = 4, [0, 2]


def _vllm_config(folder: Path, impl_class: type, present: range = range(NUM_LAYERS)) -> Any:
    profile = folder / "profile.json"
    profile.write_text(
        json.dumps(
            {
                "schema_version": 1,
                "fingerprint": "0" * 64,
                "model": "tiny",
                "num_layers": NUM_LAYERS,
                "num_kv_heads": 2,
                "dense_layers": [1],
                "anchor_layers": [3],
                "head_maps": {},
                "drop_layers": DROPPED,
                "calibration": {},
            }
        )
    )
    layers = [attention_layer(index, impl_class) for index in present]
    model_config = SimpleNamespace(
        get_total_num_hidden_layers=lambda: NUM_LAYERS,
        get_num_kv_heads=lambda parallel: 2,
        get_num_attention_heads=lambda parallel: 4,
        get_head_size=lambda: 64,
        max_model_len=128,
        model="tiny",
    )
    return SimpleNamespace(
        additional_config={"vllm_ext": {"profile": str(profile)}},
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="SINK_WINDOW")),
        model_config=model_config,
        parallel_config=None,
        cache_config=SimpleNamespace(block_size=32),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        compilation_config=SimpleNamespace(
            static_forward_context={layer.layer_name: layer for layer in layers}
        ),
    )


def _layers(config: Any) -> list[Any]:
    return list(config.compilation_config.static_forward_context.values())


def test_the_target_is_named_only_while_vllm_decides(tmp_path: Path) -> None:
    config = _vllm_config(tmp_path, ExtAttentionImpl)
    with unallocated(config):
        targets = [layer.kv_sharing_target_layer_name for layer in _layers(config)]
    kept = "model.layers.1.self_attn.attn"
    assert targets == [kept, None, kept, None]
    assert [layer.kv_sharing_target_layer_name for layer in _layers(config)] == [None] * 4
    assert [layer.impl.is_dropped for layer in _layers(config)] == [True, False, True, False]


def test_a_dropped_layer_neither_reads_nor_writes(tmp_path: Path) -> None:
    config = _vllm_config(tmp_path, ExtAttentionImpl)
    with unallocated(config):
        pass
    layer = _layers(config)[0]
    cache = torch.full((2, 2, 32, 128), torch.nan)
    tokens = torch.ones(3, 2, 64)
    layer.impl.do_kv_cache_update(layer, tokens, tokens, cache, torch.arange(3))
    assert cache.isnan().all()
    out = torch.full((3, 4, 64), torch.nan)
    metadata: Any = SimpleNamespace()  # not looked at
    layer.impl.forward(layer, torch.ones(3, 4, 64), tokens, tokens, cache, metadata, out)
    assert (out == 0).all()


def test_what_cannot_be_dropped_is_refused(tmp_path: Path) -> None:
    foreign = type("StockImpl", (), {})
    with (
        pytest.raises(ConfigError, match=r"StockImpl serves layer .* to be dropped"),
        unallocated(_vllm_config(tmp_path, foreign)),
    ):
        pass
    only_dropped = _vllm_config(tmp_path, ExtAttentionImpl, range(2, 3))
    with (
        pytest.raises(ConfigError, match="every layer of this pipeline stage"),
        unallocated(only_dropped),
    ):
        pass


def test_dense_requests_are_refused_where_layers_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.exceptions import VLLMValidationError

    from attn_backends.methods import load_method

    method = load_method("TIDAL_DECODE")
    schedule = LayerSchedule((LayerRole.DENSE,) * 3 + (LayerRole.DROP,))
    served = {
        "method": method,
        "config": method.config_cls(),
        "is_served": True,
        "schedule": schedule,
    }
    monkeypatch.setattr(selection, "_active", served)
    selection.check_request({"budget_tokens": 512})
    with pytest.raises(VLLMValidationError, match=r"drops layers \[3\]"):
        selection.check_request({"sparse": "off"})
