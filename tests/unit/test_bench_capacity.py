"""``bench capacity``: what it runs unless told otherwise, what it looks at, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attn_backends import sections
from attn_backends.config import ConfigError
from attn_backends.methods import REGISTRY
from attn_backends.profile import load_profile
from tests import flux_profile
from tests.moa_profile import write_profile, write_rules
from tests.toy_method import LINE, NAME
from vllm_ext.bench.arms import freeing_arms
from vllm_ext.bench.capacity import _Watch, markdown
from vllm_ext.methods import frees_memory

MODEL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_size": 96,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of a checkpoint that nobody has calibrated."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return tmp_path


def test_the_arms_are_stock_and_what_frees_memory_of_the_checkpoint(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY, NAME, LINE)  # a method that keeps everything
    assert freeing_arms(model, {}) == ["stock", "SINK_WINDOW"]
    rules = write_rules(model / "rules.json", 2, 6, (0, 0.5))
    assert freeing_arms(model, {"rules": rules}) == ["stock", "SINK_WINDOW", "MOA"]
    assert freeing_arms(model, {"retention": "keep_all", "rules": rules}) == ["stock"]
    shipped = load_profile(Path(write_profile(model / "shipped.json", 2, 3)))
    monkeypatch.setattr(sections, "shipped_profile", lambda folder: shipped)
    assert freeing_arms(model, {}) == ["stock", "SINK_WINDOW", "MOA"]


def test_settings_say_what_is_freed(model: Path) -> None:
    flux = flux_profile.write_profile(model / "flux.json", 2, 3, [0])
    assert frees_memory("FLUX", {"profile": flux}, model)
    assert not frees_memory("FLUX", {"profile": flux, "retention": "keep_all"}, model)
    assert not frees_memory("MOA", {"profile": flux}, model)  # has nothing for it
    other = flux_profile.write_profile(model / "other.json", 5, 3, [0])
    for wrong in (other, str(model / "typo.json")):
        with pytest.raises(ConfigError):
            frees_memory("FLUX", {"profile": wrong}, model)
    everything = write_profile(model / "all.json", 2, 3, [[0, 64]])
    assert not frees_memory("MOA", {"profile": everything}, model)
    with pytest.raises(ConfigError, match="window_tokens"):
        frees_memory("SINK_WINDOW", {"window_tokens": 0}, model)


class _Scheduler:
    """What is looked at: three requests, of which one reads its prompt, waits or is preempted."""

    def __init__(self) -> None:
        blocks = [
            SimpleNamespace(ref_cnt=count, is_null=not index)
            for index, count in enumerate([1, 1, 2, 0, 1])
        ]
        pool = SimpleNamespace(blocks=blocks)
        self.kv_cache_manager = SimpleNamespace(block_pool=pool, usage=0.5)
        self.kv_cache_config = SimpleNamespace(num_blocks=5)
        self.waiting: list[str] = []
        self.running = [self._request(str(n), 9 + n) for n in range(3)]
        self.requests = {request.request_id: request for request in self.running}
        self.scheduled: dict[str, int] = {}

    def _request(self, name: str, computed: int) -> Any:
        return SimpleNamespace(
            request_id=name, num_computed_tokens=computed, num_prompt_tokens=10, num_preemptions=0
        )

    def schedule(self) -> Any:
        return SimpleNamespace(
            num_scheduled_tokens=self.scheduled,
            total_num_scheduled_tokens=sum(self.scheduled.values()),
        )


def test_a_scheduler_is_looked_at_after_every_step_and_timed_where_all_decode() -> None:
    scheduler = _Scheduler()
    watch = _Watch(scheduler)
    for scheduled, waiting in (({"0": 9, "1": 1}, []), ({"0": 1, "1": 1}, []), ({"1": 1}, ["2"])):
        scheduler.scheduled, scheduler.waiting = scheduled, waiting
        scheduler.schedule()
        watch.look()
    assert {key: len(times) for key, times in watch._schedule_ms.items()} == {
        (2, False): 1,
        (1, True): 1,
    }
    scheduler.requests["2"].num_preemptions = 2
    scheduler.running.pop()
    watch.look()
    assert watch._peaks == {"decoding_at_once": 2, "peak_usage": 0.5, "peak_counted": 0.75}
    assert watch._preemptions.total() == 2


def _arm(decoding: int, predicted: float, **more: Any) -> dict[str, Any]:
    return {
        "decoding_at_once": decoding,
        "predicted": predicted,
        "max_concurrency": predicted / 2,
        "kv_groups": 6,
        "preemptions": 0,
        "peak_usage": 0.91,
        "peak_counted": 0.9,
        "blocks_per_decode": 716.0,
        "seconds": 20.4,
        "schedule_ms": {},
        **more,
    }


def test_the_table_compares_with_the_first_arm_and_with_the_prediction() -> None:
    steady = {"4": {"median": 0.504, "steps": 194}, "4 and others wait": {"median": 9, "steps": 1}}
    load = {"model": "m", "requests": 12, "context_tokens": 7900, "new_tokens": 288}
    load |= {"pool_requests": 4, "chunk_tokens": 512, "dtype": "auto"}
    result = {
        "load": load,
        "machine": {"cpu": "a CPU", "vllm": "0.32.0", "gpu": "none"},
        "arms": {
            "stock": _arm(4, 4.05),
            "MOA": _arm(8, 8.64, schedule_ms=steady),
            "SINK_WINDOW": _arm(12, 40.0),
        },
    }
    rows = markdown(result).splitlines()[-3:]
    assert rows[0].startswith("| stock | 4 | 1.00 | 4.0 (99%) | 0 | 6 | not timed | 91.0% / 90.0%")
    assert rows[1].startswith("| MOA | 8 | 2.00 | 8.6 (93%) | 0 | 6 | 0.50 |")
    assert rows[2].startswith("| SINK_WINDOW | 12 | 3.00 | 40.0 (100%) |")  # no more were sent
    header = markdown(result).splitlines()[-5]
    assert {row.count("|") for row in (header, *rows)} == {12}
