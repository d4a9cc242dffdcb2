"""``vllm-ext profile MODEL``: calibrates TIDAL_DECODE for a checkpoint."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from attn_backends.checkpoint import fingerprint
from attn_backends.profile import Profile
from vllm_ext.calibration import report
from vllm_ext.calibration.anchors import FORCED_TOKENS, AnchorSettings, calibrate, check
from vllm_ext.calibration.state import SavedState
from vllm_ext.cli.calibrating import (
    Bars,
    add_settings,
    earlier_profile,
    joined,
    require_files,
    require_least,
    settings_of,
    stay_offline,
    write_profile,
)
from vllm_ext.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-ext profile",
        description="Find anchor layers and head maps of a checkpoint for TIDAL_DECODE. With "
        "--method moa: what each KV head needs to see; --method flux: which layers must read "
        "everything (`--method moa --help`, `--method flux --help`).",
    )
    parser.add_argument("model", type=Path, help="model folder (Llama, Qwen or Mistral style)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="the profile to write, JSON")
    target.add_argument(
        "--check",
        type=Path,
        nargs="+",
        metavar="PROFILE",
        help="judge profiles on the prompts of --seed, one line each",
    )
    parser.add_argument(
        "--window-instead",
        action="store_true",
        help="give the layers of --drop a window instead, and keep the others full (SINK_WINDOW)",
    )
    helps = {
        "anchors": "anchor layers",
        "budget-tokens": "calibrated for",
        "block-size": "tokens per KV block",
        "context-tokens": "longest prompt",
        "examples": "prompts of each kind",
        "verifications": "end-to-end trials",
        "drop": "drop the N layers of least effect",
        "seed": "for the choice of prompts",
    }
    add_settings(parser, AnchorSettings, helps)
    return parser


def _checked(args: argparse.Namespace) -> AnchorSettings:
    """The settings from the flags.

    Raises:
        UserError: a flag out of its range, or a file that is not there.
    """
    require_files(args.model, args.corpus)
    lowest_of = {"anchors": 1, "examples": 1, "verifications": 1, "seed": 0, "drop": 0}
    lowest_of |= {"budget_tokens": sum(FORCED_TOKENS), "block_size": 1}
    require_least(args, lowest_of)
    if args.window_instead and not args.drop:
        raise UserError("--window-instead needs --drop N: it says what those layers get")
    if args.context_tokens < 2 * args.budget_tokens:
        raise UserError(
            f"--context-tokens is {args.context_tokens}; to tell good anchors from bad it must be "
            f"at least twice --budget-tokens ({args.budget_tokens})"
        )
    return settings_of(args, AnchorSettings)


def main(argv: list[str]) -> int:
    """Calibrates and writes the profile, or judges one.

    Raises:
        UserError: bad arguments, or a model of an unknown style.
    """
    args = _parser().parse_args(argv)
    settings = _checked(args)
    stay_offline()
    bars = Bars()
    if args.check is not None:
        for path, verdict in check(settings, args.check, bars.show):
            bars.echo(report.verdict_line(f"{path.name}, seed {args.seed}", verdict))
        return 0
    earlier = earlier_profile(args.output, fingerprint(settings.model))
    started = time.monotonic()
    trials = SavedState(args.output.with_suffix(".state.json"), settings.key())
    if len(trials):
        bars.echo(f"going on from {trials.path}: {len(trials)} trials are known")
    profile, costs = calibrate(settings, trials, bars.echo, bars.show)
    written = _write(joined(earlier, profile), costs, args.output)
    trials.forget()
    minutes = (time.monotonic() - started) / 60
    bars.echo(f"written in {minutes:.1f} min: {written}")
    method = "SINK_WINDOW" if args.window_instead else "TIDAL_DECODE"
    bars.echo(f"use it with --attention-backend {method} --profile {args.output}")
    return 0


def _write(profile: Profile, costs: torch.Tensor, output: Path) -> str:
    """Writes profile, report and heat map, and says which files those are."""
    write_profile(profile, output)
    image, text = output.with_suffix(".png"), output.with_suffix(".md")
    drawn = report.heat_map(profile, costs, image)
    text.write_text(report.markdown(profile, image if drawn else None))
    rest = f", {image.name}" if drawn else " (no heat map: matplotlib is not installed)"
    return f"{output}, {text.name}{rest}"
