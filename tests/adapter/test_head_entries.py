"""Retention managers over random lives of requests, for entries as a model has them: heads of MOA's
shipped profile and of rules in its published format, and layers; groups as vLLM makes them, sizes
and spans of real requests, steps that overlap. No engine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from attn_backends.config import parse_config
from attn_backends.method import Geometry
from attn_backends.methods.moa import METHOD
from attn_backends.profile import SHIPPED
from kvcache.entries import KVEntry
from kvcache.retention import AfterPrompt, KeepAll, RetentionPolicy, SpanRetention
from kvcache.spans import Span
from tests.adapter.kv_lives import EVENTS, end, event
from tests.adapter.kv_world import Scale, World

Planned = dict[str, RetentionPolicy]
ONE_HEAD = Scale(block=32, max_len=1500, chunk=256, steps_in_flight=2, num_heads=1)
LONG = replace(ONE_HEAD, max_len=2600)
WIDE, GROWING = Span(64, 512), Span(64, 128, -128, 24)
# By KV head, [alpha, beta] as MoA's files have them: negative alphas, alphas alone, a full head.
RULES = ([-1024, 0.75], [-1024, 1.0], [320, 0], [0, 0.5], [0, 1], [640, 0], [-256, 0.25], [0, 0.1])


def _named(entries: Iterable[KVEntry]) -> Planned:
    return {
        f"layer.{entry.layer}.head{(entry.heads or (0,))[0]}": entry.policy for entry in entries
    }


def _moa(num_layers: int, num_heads: int, **settings: Any) -> Planned:
    """The entries that MOA makes."""
    config = parse_config(METHOD.config_cls, settings, METHOD.name)
    geometry = Geometry(num_layers, num_heads, num_heads, 64, LONG.block, 8, LONG.max_len)
    return _named(METHOD.entries(config, METHOD.schedule(config, geometry), geometry))


def _shipped(folder: Path) -> Planned:
    return _moa(30, 3, profile=str(SHIPPED / "smollm2-135m-instruct.json"))


def _published(folder: Path) -> Planned:
    alphas, betas = zip(*RULES, strict=True)
    path = folder / "rules.json"
    path.write_text(json.dumps({"alphas": [alphas] * 2, "betas": [betas] * 2}))
    return _moa(2, len(RULES), rules=str(path))


def _by_hand(folder: Path) -> Planned:
    """Two groups of one policy among them."""
    heads = (KeepAll(), *map(SpanRetention, (WIDE, GROWING, GROWING)))
    return _named(KVEntry(layer, (head,), heads[head]) for layer in range(2) for head in range(4))


def _layers(folder: Path) -> Planned:
    policies = (KeepAll(False), SpanRetention(WIDE, False), SpanRetention(GROWING))
    return _named(KVEntry(layer, None, policy) for layer, policy in enumerate(policies))


def _answers(folder: Path) -> Planned:
    policies = (KeepAll(False), AfterPrompt(WIDE), AfterPrompt(Span(0, 100)))
    return _named(KVEntry(layer, None, policy) for layer, policy in enumerate(policies))


# How entries are made, sizes, blocks of the pool (three to six requests), and KV groups by policy.
ENTRIES: dict[str, tuple[Any, Scale, int, list[int]]] = {
    "moa-shipped": (_shipped, LONG, 1400, [3, 1, 1, 1]),
    "moa-published": (_published, LONG, 1400, [1] * 8),
    "heads": (_by_hand, ONE_HEAD, 300, [2, 1, 1]),
    "layers": (_layers, replace(ONE_HEAD, num_heads=4), 300, [1, 1, 1]),
    "answers": (_answers, replace(ONE_HEAD, num_heads=4), 300, [1, 1, 1]),
}


def _world(name: str, folder: Path, seed: int, num_blocks: int | None = None) -> World:
    make, scale, blocks, _ = ENTRIES[name]
    return World(make(folder), seed, num_blocks or blocks, caching=True, scale=scale)


@pytest.mark.parametrize("name", ENTRIES)
def test_ten_thousand_events_of_every_class_lose_and_leak_nothing(
    name: str, tmp_path: Path
) -> None:
    """Every event is one of every group's manager."""
    world = _world(name, tmp_path, seed=11)
    groups = Counter(world.policies)
    assert sorted(groups.values(), reverse=True) == ENTRIES[name][3]
    while world.events.total() < 10_000:
        world.check_tables(event(world))
        if world.events.total() % 8 == 0:  # what is wrong stays wrong
            world.check()
    assert EVENTS | {"hit"} <= set(world.events)
    managers = world.manager.coordinator.single_type_managers
    for policy, manager in zip(world.policies, managers, strict=True):
        if not isinstance(policy, KeepAll):
            assert manager.num_freed_blocks > 100, policy.identity
    end(world)


@pytest.mark.parametrize("name", ["moa-shipped", "moa-published"])
def test_prompts_are_read_in_the_blocks_they_were_admitted_with(name: str, tmp_path: Path) -> None:
    """A pool exactly as large as admission says for all groups: no chunk is ever refused."""
    scale, prompts = ENTRIES[name][1], [90, 700, 1300, 2599]
    policies = _world(name, tmp_path, seed=3).policies
    held = [
        policy.held_blocks(prompt, scale.in_flight, scale.block)
        if isinstance(policy, SpanRetention)
        else -(-prompt // scale.block)
        for prompt in prompts
        for policy in policies
    ]
    world = _world(name, tmp_path, seed=3, num_blocks=sum(held) + 1)
    lives = [world.request([family] * prompt) for family, prompt in enumerate(prompts)]
    while unread := [life for life in lives if life.num_computed < life.request.num_tokens]:
        for life in unread:
            assert world.schedule(life)
        world.check()
