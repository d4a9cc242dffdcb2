"""``vllm-ext profile MODEL``: calibrates TIDAL_DECODE for a checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from attn_backends.plan import LayerSchedule
from attn_backends.profile import Profile, fingerprint, load_profile
from vllm_ext.calibration import report, search
from vllm_ext.calibration.data import Example, make_examples
from vllm_ext.calibration.probe import Budget, Probe, load_probed_model
from vllm_ext.calibration.search import Verdict
from vllm_ext.errors import UserError

DENSE_LAYERS = 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-ext profile", description="Find anchor layers and head maps of a checkpoint."
    )
    parser.add_argument("model", help="model folder (Llama, Qwen or Mistral style)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="the profile to write, JSON")
    target.add_argument(
        "--check", type=Path, metavar="PROFILE", help="judge a profile on the prompts of --seed"
    )
    parser.add_argument("--anchors", type=int, default=4, help="anchor layers (4)")
    parser.add_argument("--budget-tokens", type=int, default=512, help="calibrated for (512)")
    parser.add_argument("--block-size", type=int, default=32, help="tokens per KV block (32)")
    parser.add_argument("--context-tokens", type=int, default=3000, help="longest prompt (3000)")
    parser.add_argument("--examples", type=int, default=5, help="prompts of each kind (5)")
    parser.add_argument("--verifications", type=int, default=40, help="end-to-end trials (40)")
    parser.add_argument("--corpus", type=Path, help="calibration text (default: Python's library)")
    parser.add_argument("--seed", type=int, default=0, help="for the choice of prompts (0)")
    return parser


def _check(args: Any) -> None:
    if not Path(args.model, "config.json").is_file():
        raise UserError(f"{args.model} is not a model folder (no config.json)")
    if args.corpus is not None and not args.corpus.is_file():
        raise UserError(f"--corpus: {args.corpus} does not exist")
    for name, lowest in (("anchors", 1), ("examples", 1), ("verifications", 1), ("seed", 0)):
        if getattr(args, name) < lowest:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least {lowest}")
    if args.context_tokens < 2 * args.budget_tokens:
        raise UserError(
            f"--context-tokens is {args.context_tokens}; to tell good anchors from bad it must be "
            f"at least twice --budget-tokens ({args.budget_tokens})"
        )


def main(argv: list[str]) -> int:
    """Calibrates and writes the profile.

    Raises:
        UserError: bad arguments, or a model of an unknown style.
    """
    args = _parser().parse_args(argv)
    _check(args)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    started = time.monotonic()

    def echo(line: str) -> None:
        print(f"profile [{time.monotonic() - started:4.0f} s] {line}", flush=True)

    if args.check is not None:
        verdict = check(args, load_profile(args.check), echo)
        echo(
            f"{args.check.name}, seed {args.seed}: KL text {verdict.kl_text:.4f}, retrieval "
            f"{verdict.kl_retrieval:.4f}, top-1 agreement {verdict.agreement:.3f}"
        )
        return 0
    profile, layers = calibrate(args, echo)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_suffix(".partial")
    partial.write_text(profile.model_dump_json(indent=1) + "\n")
    os.replace(partial, args.output)
    image, text = args.output.with_suffix(".png"), args.output.with_suffix(".md")
    drawn = report.heat_map(profile, layers, image)
    text.write_text(report.markdown(profile, image if drawn else None))
    echo(f"written: {args.output}, {text.name}, {image.name if drawn else 'no plot: matplotlib'}")
    echo(f"use it with --attention-backend TIDAL_DECODE --profile {args.output}")
    return 0


def _prepare(args: Any) -> tuple[Any, Probe, list[Example]]:
    """The probed model and the prompts of the seed."""
    from transformers import AutoTokenizer

    torch.manual_seed(args.seed)
    probe = Probe(Budget(args.block_size, -(-args.budget_tokens // args.block_size), 1, 2))
    model = load_probed_model(args.model, probe)
    if not hasattr(model, "model") or not hasattr(model.model, "layers"):
        raise UserError(f"{args.model}: only decoder-only models with model.layers are supported")
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    return (
        model,
        probe,
        make_examples(tokenizer, args.seed, args.corpus, args.context_tokens, args.examples),
    )


def check(args: Any, profile: Profile, echo: Callable[[str], None]) -> Verdict:
    """Fidelity of an existing profile on the prompts of ``--seed``; choose another seed than
    the one it was calibrated with.

    Raises:
        UserError: the profile is another checkpoint's.
    """
    if profile.fingerprint != fingerprint(Path(args.model)):
        raise UserError(f"{args.check} was made for another checkpoint ({profile.model})")
    model, probe, examples = _prepare(args)
    recordings = []
    for number, example in enumerate(examples, 1):
        recordings.append(search.record(model, probe, example))
        echo(f"recorded {number}/{len(examples)}: {example.kind}, {len(example.ids)} tokens")
    return search.verify(model, probe, profile.schedule(), recordings)


def calibrate(args: Any, echo: Callable[[str], None]) -> tuple[Profile, torch.Tensor]:
    """Runs the four stages described in ``vllm_ext.calibration.search``.

    Returns:
        The profile, and ``[num_layers a, num_layers b]`` similarities for the report.
    """
    model, probe, examples = _prepare(args)
    recordings, pair_scores, importance = [], [], []
    for number, example in enumerate(examples, 1):
        recording = search.record(model, probe, example)
        pair_scores.append(search.similarity(recording, probe))
        importance.append(recording.importance)
        recordings.append(recording)
        echo(f"recorded {number}/{len(examples)}: {example.kind}, {len(example.ids)} tokens")
    pairs = torch.stack(pair_scores).mean(0)
    layers = pairs.amax(2).mean(2)  # best head of a, averaged over the heads of b
    scores = layers * torch.stack(importance).mean(0)[None, :]
    candidates = search.best_anchor_sets(scores, args.anchors, DENSE_LAYERS, num_sets=6)

    def judge(anchors: tuple[int, ...]) -> Verdict:
        schedule = search.make_schedule(anchors, pairs, DENSE_LAYERS)
        return search.verify(model, probe, schedule, recordings)

    num_layers = pairs.shape[0]
    best, verdicts = search.search(candidates, num_layers, judge, args.verifications, echo)
    echo(f"chosen: anchors {list(best.anchors)}")
    schedule = search.make_schedule(best.anchors, pairs, DENSE_LAYERS)
    return _profile(args, schedule, best, verdicts), layers


def _profile(args: Any, schedule: LayerSchedule, best: Verdict, verdicts: list[Verdict]) -> Profile:
    config = json.loads(Path(args.model, "config.json").read_text())
    settings = ("budget_tokens", "block_size", "context_tokens", "examples", "seed")
    ranked = sorted(verdicts, key=lambda v: v.loss)[:10]
    return Profile(
        schema_version=1,
        fingerprint=fingerprint(Path(args.model)),
        model=Path(args.model).name,
        num_layers=len(schedule.roles),
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        dense_layers=list(range(DENSE_LAYERS)),
        anchor_layers=list(best.anchors),
        head_maps={layer: list(heads) for layer, heads in schedule.head_maps.items()},
        calibration={name: getattr(args, name) for name in settings}
        | {"best": asdict(best), "verdicts": [asdict(verdict) for verdict in ranked]},
    )
