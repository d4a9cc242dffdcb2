"""The recall guard on a bad profile, and the shadow audit, on the real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attn_backends.profile import shipped_profile
from tests.e2e.engine import run_engine

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NEW_TOKENS = 32
BAD_ANCHORS = [2, 3, 19, 22]  # none sees what the layers between 3 and 19 look for
FLOOR = 0.55


@pytest.fixture(scope="module")
def bad_profile(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped profile with anchors in the wrong places."""
    shipped = shipped_profile(Path(model_path))
    assert shipped is not None
    content = json.loads(shipped.model_dump_json())
    bad = {"dense_layers": [0, 1], "anchor_layers": BAD_ANCHORS, "head_maps": {}}
    content["methods"] = {"TIDAL_DECODE": bad}
    path = tmp_path_factory.mktemp("profile") / "bad.json"
    path.write_text(json.dumps(content))
    return str(path)


def _needles(model_path: str) -> list[Any]:
    from transformers import AutoTokenizer

    from vllm_ext.evaluation.prompts import needle_prompts

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    return needle_prompts(tokenizer, 0, {"passkey": [1]}, [3000], [0.1, 0.3, 0.5, 0.7])


def _run(
    model_path: str, settings: dict[str, Any], extra_args: dict[str, Any] | None = None
) -> tuple[list[float], dict[str, float], dict[str, float]]:
    """Scores, rows by reason and our other figures for the needle prompts."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    needles = _needles(model_path)
    engine = {
        "model": model_path,
        "dtype": "float32",
        "max_model_len": 3200,
        "kv_cache_memory_bytes": 1300 << 20,
        "enforce_eager": True,
        "attention_backend": "TIDAL_DECODE",
        "additional_config": {"vllm_ext": settings},
    }
    job = {
        "prompts": [needle.ids for needle in needles],
        "extra_args": [extra_args] * len(needles),
        "together": True,
        "max_tokens": NEW_TOKENS,
    }
    answer = run_engine(engine, [job])
    texts = [tokenizer.decode(a["tokens"]) for a in answer["jobs"][0]]
    rows = {key.split("|", 1)[1]: count for key, count in answer["rows"].items()}
    scores = [needle.score(text) for needle, text in zip(needles, texts, strict=True)]
    return scores, rows, answer["figures"]


def test_the_guard_restores_dense_answers_under_a_bad_profile(
    model_path: str, bad_profile: str
) -> None:
    settings = {"profile": bad_profile}
    dense, _, _ = _run(model_path, settings, {"sparse": "off"})
    unguarded, rows, _ = _run(model_path, settings)
    assert set(rows) == {"sparse|selected"}
    guarded, rows, figures = _run(model_path, settings | {"recall_floor": FLOOR})
    assert sum(unguarded) < sum(dense), "the profile is not bad: nothing is shown"
    assert guarded == dense
    # The cost: almost every step is dense, and those before were checked.
    assert rows["dense|guard"] >= len(dense) * (NEW_TOKENS - 10)
    assert figures["vllm_ext:guard_requests|dense"] == len(dense)


def test_the_guard_leaves_a_good_profile_alone(model_path: str) -> None:
    _, rows, figures = _run(model_path, {"recall_floor": FLOOR})
    assert "dense|guard" not in rows
    assert figures["vllm_ext:selection_recall|served"] > FLOOR


def test_the_audit_changes_nothing_and_measures(model_path: str) -> None:
    plain, _, _ = _run(model_path, {})
    audited, rows, figures = _run(model_path, {"audit_share": 0.5})
    assert audited == plain
    # Every other decode-only step, one row of at most four.
    assert figures["vllm_ext:audit_rows"] >= 0.4 * rows["sparse|selected"] / 4
    mean_kl = figures["vllm_ext:audit_kl_sum"] / figures["vllm_ext:audit_rows"]
    assert 0 < mean_kl < 0.1
    assert figures["vllm_ext:audit_agreements"] <= figures["vllm_ext:audit_rows"]
    assert figures["vllm_ext:audit_kv_bytes_saved"] > 0


def test_guard_and_audit_work_on_kept_selections(model_path: str, bad_profile: str) -> None:
    settings = {"profile": bad_profile, "recall_floor": FLOOR, "reselect_steps": 4}
    dense, _, _ = _run(model_path, settings, {"sparse": "off"})
    guarded, rows, figures = _run(model_path, settings | {"audit_share": 0.5})
    assert guarded == dense
    assert figures["vllm_ext:guard_requests|dense"] == len(dense)
    assert 0 < figures["vllm_ext:audit_rows"] <= rows["sparse|selected"]
