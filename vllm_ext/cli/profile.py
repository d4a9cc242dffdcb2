"""``vllm-ext profile MODEL``: calibrates TIDAL_DECODE for a checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from attn_backends.budget import BudgetConfig
from attn_backends.config import read_text
from attn_backends.findings import Findings
from attn_backends.methods.sink_window import METHOD as SINK_WINDOW
from attn_backends.methods.sink_window import WindowSection
from attn_backends.methods.tidal_decode import METHOD as TIDAL_DECODE
from attn_backends.methods.tidal_decode import AnchorSection
from attn_backends.plan import LayerSchedule
from attn_backends.profile import (
    SCHEMA_VERSION,
    Profile,
    fingerprint,
    load_profile,
    read_model_config,
)
from vllm_ext.calibration import report, search
from vllm_ext.calibration.data import Sizes, make_examples
from vllm_ext.calibration.layer_similarity import least_important
from vllm_ext.calibration.probe import Budget, Probe, load_probed_model
from vllm_ext.calibration.search import Recording, Verdict
from vllm_ext.errors import UserError

DENSE_LAYERS = 1
MAX_STATE_BYTES = 64 << 20
FORCED_TOKENS = BudgetConfig.sink_tokens, BudgetConfig.recent_tokens  # as servers by default
HELD_OUT_SEED = 1_000_003  # added to --seed: prompts that choose nothing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-ext profile", description="Find anchor layers and head maps of a checkpoint."
    )
    parser.add_argument("model", help="model folder (Llama, Qwen or Mistral style)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="the profile to write, JSON")
    target.add_argument(
        "--check",
        type=Path,
        nargs="+",
        metavar="PROFILE",
        help="judge profiles on the prompts of --seed, one line each",
    )
    parser.add_argument("--anchors", type=int, default=8, help="anchor layers (8)")
    parser.add_argument("--budget-tokens", type=int, default=512, help="calibrated for (512)")
    parser.add_argument("--block-size", type=int, default=32, help="tokens per KV block (32)")
    parser.add_argument("--context-tokens", type=int, default=4096, help="longest prompt (4096)")
    parser.add_argument("--examples", type=int, default=8, help="prompts of each kind (8)")
    parser.add_argument("--verifications", type=int, default=40, help="end-to-end trials (40)")
    parser.add_argument(
        "--drop", type=int, default=0, metavar="N", help="drop the N layers of least effect (0)"
    )
    parser.add_argument(
        "--window-instead",
        action="store_true",
        help="give the layers of --drop a window instead, and keep the others full (SINK_WINDOW)",
    )
    parser.add_argument("--corpus", type=Path, help="calibration text (default: Python's library)")
    parser.add_argument("--seed", type=int, default=0, help="for the choice of prompts (0)")
    return parser


def _check(args: Any) -> None:
    if not Path(args.model, "config.json").is_file():
        raise UserError(f"{args.model} is not a model folder (no config.json)")
    if args.corpus is not None and not args.corpus.is_file():
        raise UserError(f"--corpus: {args.corpus} does not exist")
    lowest_of = {"anchors": 1, "examples": 1, "verifications": 1, "seed": 0, "drop": 0}
    lowest_of |= {"budget_tokens": sum(FORCED_TOKENS), "block_size": 1}
    for name, lowest in lowest_of.items():
        if getattr(args, name) < lowest:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {getattr(args, name)}; it must be at least {lowest}")
    if args.window_instead and not args.drop:
        raise UserError("--window-instead needs --drop N: it says what those layers get")
    if args.context_tokens < 2 * args.budget_tokens:
        raise UserError(
            f"--context-tokens is {args.context_tokens}; to tell good anchors from bad it must be "
            f"at least twice --budget-tokens ({args.budget_tokens})"
        )


def main(argv: list[str]) -> int:
    """Calibrates and writes the profile, or judges one.

    Raises:
        UserError: bad arguments, or a model of an unknown style.
    """
    args = _parser().parse_args(argv)
    _check(args)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if args.check is not None:
        for path, verdict in check(args):
            print(verdict_line(f"{path.name}, seed {args.seed}", verdict), flush=True)
        return 0
    started = time.monotonic()
    state = State(args)
    profile, costs = calibrate(args, state)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_suffix(".partial")
    partial.write_text(profile.model_dump_json(indent=1) + "\n")
    os.replace(partial, args.output)
    image, text = args.output.with_suffix(".png"), args.output.with_suffix(".md")
    drawn = report.heat_map(profile, costs, image)
    text.write_text(report.markdown(profile, image if drawn else None))
    state.forget()
    minutes = (time.monotonic() - started) / 60
    print(f"written in {minutes:.1f} min: {args.output}, {text.name}", end="")
    print(f", {image.name}" if drawn else " (no heat map: matplotlib is not installed)")
    method = "SINK_WINDOW" if args.window_instead else "TIDAL_DECODE"
    print(f"use it with --attention-backend {method} --profile {args.output}")
    return 0


def verdict_line(name: str, verdict: Verdict) -> str:
    """One line for people."""
    return (
        f"{name}: KL text {verdict.kl_text:.4f}, retrieval {verdict.kl_retrieval:.4f}; top-1 "
        f"text {verdict.agreement_text:.1%}, retrieval {verdict.agreement_retrieval:.1%}"
    )


def _state(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path, MAX_STATE_BYTES, named=str(path)))
        return {"key": dict(found["key"]), "verdicts": dict(found["verdicts"])}
    except (ValueError, TypeError, KeyError, RecursionError):  # ConfigError is a ValueError
        raise UserError(f"{path} is not of an interrupted calibration; remove it") from None


class State:
    """Verdicts so far, kept beside the output: an interrupted calibration goes on from there."""

    def __init__(self, args: Any) -> None:
        self._path = args.output.with_suffix(".state.json")
        free = ("output", "drop", "window_instead")  # they change no verdict on anchors
        kept = {key: str(value) for key, value in vars(args).items() if key not in free}
        # What the verdicts are of.
        served = {"anchor_attention": "selected", "forced_tokens": str(FORCED_TOKENS)}
        self._key = kept | served | {"fingerprint": fingerprint(Path(args.model))}
        self._verdicts: dict[str, dict[str, Any]] = {}
        if self._path.is_file():
            found = _state(self._path)
            if found["key"] == self._key:
                self._verdicts = found["verdicts"]
                print(f"going on from {self._path}: {len(self._verdicts)} trials are known")

    def recall(self, anchors: tuple[int, ...]) -> Verdict | None:
        """The verdict of an earlier run with the same settings."""
        found = self._verdicts.get(str(anchors))
        return None if found is None else Verdict(**(found | {"anchors": anchors}))

    def keep(self, verdict: Verdict) -> None:
        """Writes it down at once."""
        self._verdicts[str(verdict.anchors)] = asdict(verdict)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"key": self._key, "verdicts": self._verdicts}))
        os.replace(partial, self._path)

    def forget(self) -> None:
        """The profile is written: nothing to go on from."""
        self._path.unlink(missing_ok=True)


class Bench:
    """The probed model, its tokenizer and the settings."""

    def __init__(self, args: Any) -> None:
        from transformers import AutoTokenizer

        torch.manual_seed(args.seed)
        self._args = args
        self.probe = Probe(probed_budget(args.budget_tokens, args.block_size))
        self.model = load_probed_model(args.model, self.probe)
        layers = getattr(getattr(self.model, "model", None), "layers", None)
        if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
            raise UserError(
                f"{args.model}: only decoder-only models with model.layers, each with a "
                "self_attn, are known"
            )
        self._tokenizer: Any = AutoTokenizer.from_pretrained(args.model)

    def record(self, seed: int, num_each: int, title: str) -> list[Recording]:
        """One dense pass over the prompts of a seed, with a progress bar."""
        args = self._args
        sizes = Sizes(args.context_tokens, num_each)
        examples = make_examples(self._tokenizer, seed, args.corpus, sizes)
        return [
            search.record(self.model, self.probe, example)
            for example in tqdm(examples, desc=title, unit="prompt")
        ]

    def verify(self, schedule: LayerSchedule, recordings: list[Recording]) -> Verdict:
        """See ``search.verify``; anchors attend their selection, as they do when served."""
        served = schedule.with_selecting_anchors()
        return search.verify(self.model, self.probe, served, recordings)


def probed_budget(budget_tokens: int, block_size: int) -> Budget:
    """The blocks that a server of this block size reads under the method's default settings."""
    sinks, recent = (-(-forced_tokens // block_size) for forced_tokens in FORCED_TOKENS)
    return Budget(block_size, max(-(-budget_tokens // block_size), sinks + recent), sinks, recent)


def check(args: Any) -> Iterator[tuple[Path, Verdict]]:
    """Fidelity of existing profiles on the prompts of ``--seed``; choose another seed than the
    one they were calibrated with.

    Raises:
        UserError: a profile is another checkpoint's.
    """
    schedules = {}
    for path in args.check:
        profile = load_profile(path)
        if profile.fingerprint != fingerprint(Path(args.model)):
            raise UserError(f"{path} was made for another checkpoint ({profile.model})")
        section = profile.section(TIDAL_DECODE.name, AnchorSection)
        schedules[path] = section.schedule(profile.num_layers)
    bench = Bench(args)
    recordings = bench.record(args.seed, args.examples, "prompts")
    for path, schedule in schedules.items():
        yield path, bench.verify(schedule, recordings)


def calibrate(args: Any, state: State) -> tuple[Profile, torch.Tensor]:
    """Runs the stages described in ``vllm_ext.calibration.search``.

    Returns:
        The profile, and ``[num_layers a, num_layers b]`` errors for the report.
    """
    bench = Bench(args)
    recordings = bench.record(args.seed, args.examples, "measuring reuse")
    errors, found = search.mean_errors(recordings), search.findings(bench.model, recordings)
    costs = search.layer_errors(errors)
    candidates = search.best_anchor_sets(costs, args.anchors, DENSE_LAYERS, num_sets=6)
    if not candidates:
        raise UserError(f"--anchors is {args.anchors}; the model has {len(costs)} layers")
    bar = tqdm(total=args.verifications, desc="proving anchors", unit="trial")

    def judge(anchors: tuple[int, ...]) -> Verdict:
        verdict = state.recall(anchors)
        if verdict is None:
            schedule = search.make_schedule(anchors, errors, DENSE_LAYERS)
            verdict = bench.verify(schedule, recordings)
            state.keep(verdict)
        bar.update()
        return verdict

    best, verdicts = search.search(candidates, len(costs), judge, args.verifications)
    bar.close()
    print(verdict_line(f"chosen: anchors {list(best.anchors)}", best))
    schedule = search.make_schedule(best.anchors, errors, DENSE_LAYERS)
    least = _least_important(args, best.anchors, found)
    if not args.window_instead:
        schedule = search.without_layers(schedule, least)
    recordings.clear()  # the memory is needed for the others
    held_out = bench.record(args.seed + HELD_OUT_SEED, max(2, args.examples // 2), "held out")
    by_budget = {}
    for factor in (0.5, 1, 2):
        budget_tokens = int(args.budget_tokens * factor)
        bench.probe.budget = probed_budget(budget_tokens, args.block_size)
        by_budget[budget_tokens] = bench.verify(schedule, held_out)
        print(verdict_line(f"held out, {budget_tokens} tokens", by_budget[budget_tokens]))
    return _profile(args, schedule, least, found, _figures(args, verdicts, by_budget)), costs


def _least_important(args: Any, anchors: tuple[int, ...], found: Findings) -> list[int]:
    protected = {*range(DENSE_LAYERS), *anchors}
    try:
        least = least_important(found.layer_similarity, protected, args.drop)
    except ValueError as error:
        raise UserError(f"--drop is {args.drop}: {error}") from None
    if least:
        print(f"{'window' if args.window_instead else 'drop'} layers: {least}")
    return least


def _figures(args: Any, verdicts: list[Verdict], by_budget: dict[int, Verdict]) -> dict[str, Any]:
    settings = ("budget_tokens", "block_size", "context_tokens", "examples", "seed")
    ranked = sorted(verdicts, key=lambda v: v.loss)[:10]
    return {name: getattr(args, name) for name in settings} | {
        "held_out": {str(budget): asdict(v) for budget, v in by_budget.items()},
        "verdicts": [asdict(verdict) for verdict in ranked],
    }


def _profile(
    args: Any, schedule: LayerSchedule, least: list[int], found: Findings, figures: dict[str, Any]
) -> Profile:
    """A section for TIDAL_DECODE; with --drop one for SINK_WINDOW, which drops those layers, too,
    or gives them the window.
    """
    config, num_layers = read_model_config(Path(args.model)), len(schedule.roles)
    profile = Profile(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint(Path(args.model)),
        model=Path(args.model).name,
        num_layers=num_layers,
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        findings=found,
        calibration=figures,
    ).with_section(TIDAL_DECODE.name, AnchorSection.of(schedule))
    if not least:
        return profile
    if not args.window_instead:
        return profile.with_section(SINK_WINDOW.name, WindowSection(drop_layers=least))
    full = [layer for layer in range(num_layers) if layer not in least]
    return profile.with_section(SINK_WINDOW.name, WindowSection(full_layers=full))
