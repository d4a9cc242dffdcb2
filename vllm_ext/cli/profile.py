"""``vllm-ext profile MODEL``: calibrates TIDAL_DECODE for a checkpoint."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from attn_backends.profile import Profile
from vllm_ext.calibration import report
from vllm_ext.calibration.anchors import FORCED_TOKENS, AnchorSettings, calibrate, check
from vllm_ext.calibration.trials import Trials
from vllm_ext.errors import UserError


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
    for setting, text in (
        ("anchors", "anchor layers"),
        ("budget-tokens", "calibrated for"),
        ("block-size", "tokens per KV block"),
        ("context-tokens", "longest prompt"),
        ("examples", "prompts of each kind"),
        ("verifications", "end-to-end trials"),
        ("drop", "drop the N layers of least effect"),
        ("seed", "for the choice of prompts"),
    ):
        parser.add_argument(f"--{setting}", type=int, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument(
        "--window-instead",
        action="store_true",
        help="give the layers of --drop a window instead, and keep the others full (SINK_WINDOW)",
    )
    parser.add_argument("--corpus", type=Path, help="calibration text (default: Python's library)")
    settings = (field for field in fields(AnchorSettings) if field.default is not MISSING)
    parser.set_defaults(**{field.name: field.default for field in settings})
    return parser


def _checked(args: argparse.Namespace) -> AnchorSettings:
    """The settings from the flags.

    Raises:
        UserError: a flag out of its range, or a file that is not there.
    """
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
    given = {field.name: getattr(args, field.name) for field in fields(AnchorSettings)}
    return AnchorSettings(**given | {"model": Path(args.model)})


def main(argv: list[str]) -> int:
    """Calibrates and writes the profile, or judges one.

    Raises:
        UserError: bad arguments, or a model of an unknown style.
    """
    args = _parser().parse_args(argv)
    settings = _checked(args)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    bars = _Bars()
    if args.check is not None:
        for path, verdict in check(settings, args.check, bars.show):
            bars.echo(report.verdict_line(f"{path.name}, seed {args.seed}", verdict))
        return 0
    started = time.monotonic()
    trials = Trials(args.output.with_suffix(".state.json"), settings.key())
    if len(trials):
        bars.echo(f"going on from {trials.path}: {len(trials)} trials are known")
    profile, costs = calibrate(settings, trials, bars.echo, bars.show)
    written = _write(profile, costs, args.output)
    trials.forget()
    minutes = (time.monotonic() - started) / 60
    bars.echo(f"written in {minutes:.1f} min: {written}")
    method = "SINK_WINDOW" if args.window_instead else "TIDAL_DECODE"
    bars.echo(f"use it with --attention-backend {method} --profile {args.output}")
    return 0


class _Bars:
    """A progress bar of the work being done, and lines above it."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._title = ""

    def show(self, title: str, done: int, total: int) -> None:
        """See ``calibration.anchors.Progress``."""
        if title != self._title:
            self._close()
            self._bar, self._title = tqdm(total=total, desc=title, unit="step"), title
        self._bar.update(done - self._bar.n)
        if done == total:
            self._close()

    def echo(self, line: str) -> None:
        """Prints a line; what the bar showed is over."""
        self._close()
        print(line, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._title = None, ""


def _write(profile: Profile, costs: torch.Tensor, output: Path) -> str:
    """Writes profile, report and heat map, and says which files those are."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text(profile.model_dump_json(indent=1) + "\n")
    os.replace(partial, output)
    image, text = output.with_suffix(".png"), output.with_suffix(".md")
    drawn = report.heat_map(profile, costs, image)
    text.write_text(report.markdown(profile, image if drawn else None))
    rest = f", {image.name}" if drawn else " (no heat map: matplotlib is not installed)"
    return f"{output}, {text.name}{rest}"
