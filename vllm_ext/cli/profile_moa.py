"""``vllm-ext profile MODEL --method moa``: calibrates MOA for a checkpoint."""

from __future__ import annotations

import argparse
import time

from attn_backends.checkpoint import fingerprint
from attn_backends.methods.moa import METHOD as MOA
from vllm_ext.calibration import elastic_report
from vllm_ext.calibration.elastic import Calibration, ElasticSettings
from vllm_ext.calibration.state import SavedState
from vllm_ext.cli.calibrating import (
    Bars,
    add_settings,
    earlier_profile,
    joined,
    parser_of,
    require_files,
    require_least,
    settings_of,
    stay_offline,
    write_profile,
)
from vllm_ext.errors import UserError

LEAST_CONTEXT_TOKENS = 1024


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(
        MOA.name,
        "Find out what each KV head of a checkpoint needs to see.",
    )
    parser.add_argument(
        "--density",
        type=float,
        metavar="SHARE",
        help="of the longest prompt's tokens that the heads keep, on average (%(default)s)",
    )
    helps = {
        "context-tokens": "longest prompt; validated at twice that",
        "examples": "prompts of each kind and length",
        "sink-tokens": "first tokens that every head sees",
        "floor-tokens": "least tokens before it that a query sees",
        "seed": "for the choice of prompts",
    }
    add_settings(parser, ElasticSettings, helps)
    return parser


def _checked(args: argparse.Namespace) -> ElasticSettings:
    """The settings from the flags.

    Raises:
        UserError: a flag out of its range, or a file that is not there.
    """
    require_files(args.model, args.corpus)
    if not 0 < args.density <= 1:
        raise UserError(f"--density is {args.density}; it must be above 0 and at most 1")
    lowest_of = {"context_tokens": LEAST_CONTEXT_TOKENS, "examples": 1, "seed": 0}
    require_least(args, lowest_of | {"sink_tokens": 0, "floor_tokens": 1})
    return settings_of(args, ElasticSettings)


def main(argv: list[str]) -> int:
    """Calibrates and writes the profile.

    Raises:
        UserError: bad arguments, or a model of an unknown style.
    """
    args = _parser().parse_args(argv)
    settings = _checked(args)
    earlier = earlier_profile(args.output, fingerprint(settings.model))
    stay_offline()
    bars, started = Bars(), time.monotonic()
    state = SavedState(args.output.with_suffix(".moa.state.json"), settings.key())
    if len(state):
        bars.echo(f"going on from {state.path}: {len(state)} measurements are known")
    profile, shown = Calibration(settings, state, bars.echo, bars.show).run()
    write_profile(joined(earlier, profile), args.output)
    image, text = args.output.with_suffix(".moa.png"), args.output.with_suffix(".moa.md")
    drawn = elastic_report.span_map(profile, shown, image)
    text.write_text(elastic_report.markdown(profile, shown, image if drawn else None))
    state.forget()
    minutes = (time.monotonic() - started) / 60
    rest = f", {image.name}" if drawn else " (no span map: matplotlib is not installed)"
    bars.echo(f"written in {minutes:.1f} min: {args.output}, {text.name}{rest}")
    bars.echo(f"use it with --attention-backend {MOA.name} --profile {args.output}")
    return 0
