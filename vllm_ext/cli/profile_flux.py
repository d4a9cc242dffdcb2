"""``vllm-ext profile MODEL --method flux``: calibrates FLUX for a checkpoint."""

from __future__ import annotations

import argparse
import re
import time
from functools import partial

import torch

from attn_backends.checkpoint import fingerprint
from attn_backends.methods.flux import METHOD as FLUX
from vllm_ext.calibration import flux_report
from vllm_ext.calibration.flux import Calibration, FluxSettings
from vllm_ext.calibration.flux_section import ROUTER_CHOICES, decided, flux_profile
from vllm_ext.calibration.routing_fit import FOLDS
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
from vllm_ext.cli.flux_prompts import held_out
from vllm_ext.errors import UserError

LEAST_CONTEXT_TOKENS = 1024
LEAST_GAP_TOKENS = 256


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(
        FLUX.name,
        "Find out which layers of a checkpoint must read everything: always, never, or "
        "by what a request's prompt shows. The profile routes requests only if that is better on "
        "prompts that chose nothing. What was measured is kept beside it: another --share or "
        "--router takes half a minute.",
    )
    parser.add_argument(
        "--share",
        type=float,
        metavar="SHARE",
        help="of the layers that are full, on average over requests (%(default)s)",
    )
    parser.add_argument(
        "--router",
        choices=ROUTER_CHOICES,
        default="auto",
        help="auto: routes by request only if they are better than the same layers for all",
    )
    helps = {
        "context-tokens": "longest prompt that is fitted; held-out ones are up to twice as long",
        "prompts": "that are fitted, a third of each kind: retrieval, text, instructions",
        "order-prompts": "of these, that order the layers",
        "held-out": "prompts that judge the result",
        "sink-tokens": "first tokens that sparse layers see",
        "window-tokens": "last tokens that they see",
        "seed": "for the choice of prompts",
    }
    add_settings(parser, FluxSettings, helps)
    return parser


def _checked(args: argparse.Namespace) -> FluxSettings:
    """The settings from the flags.

    Raises:
        UserError: a flag out of its range, or a file that is not there.
    """
    require_files(args.model, args.corpus)
    if not 0 < args.share < 1:
        raise UserError(f"--share is {args.share}; it must be above 0 and below 1")
    lowest_of = {"context_tokens": LEAST_CONTEXT_TOKENS, "seed": 0, "sink_tokens": 0}
    lowest_of |= {"prompts": 3 * FOLDS, "order_prompts": 3, "held_out": 6, "window_tokens": 1}
    require_least(args, lowest_of)
    least = args.sink_tokens + args.window_tokens + LEAST_GAP_TOKENS
    if args.context_tokens < least:
        raise UserError(
            f"--context-tokens is {args.context_tokens}; for a gap to see between sinks and window "
            f"it must be at least {least}"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}", args.output.stem):
        raise UserError(
            f"--output is {args.output.name!r}; the routers' file is named after it, so its name "
            "may have only letters, digits, dots, - and _"
        )
    return settings_of(args, FluxSettings)


def main(argv: list[str]) -> int:
    """Calibrates and writes the profile.

    Raises:
        UserError: bad arguments, or a model of an unknown style.
    """
    args = _parser().parse_args(argv)
    settings = _checked(args)
    earlier = earlier_profile(args.output, fingerprint(settings.model))
    stay_offline()
    torch.set_grad_enabled(False)
    bars, started = Bars(), time.monotonic()
    state = SavedState(args.output.with_suffix(".flux.state.json"), settings.key())
    if len(state):
        bars.echo(f"going on from {state.path}: {len(state)} measurements are known")
    judges = partial(held_out, corpus=settings.corpus, seed=settings.seed + 1)
    found = Calibration(settings, state, judges, bars.echo, bars.show).run()
    decision = decided(found, args.router)
    if args.router == "always" and not decision.is_routed:
        raise UserError(f"--router always: {decision.reason}")
    profile = flux_profile(settings, found, decision, args.output.with_suffix(".flux.safetensors"))
    write_profile(joined(earlier, profile), args.output)
    image, text = args.output.with_suffix(".flux.png"), args.output.with_suffix(".flux.md")
    drawn = flux_report.route_plot(profile.model, settings, found, image)
    text.write_text(
        flux_report.markdown(profile.model, settings, found, decision, image if drawn else None)
    )
    served = "routes by request" if decision.is_routed else "static layers"
    bars.echo(f"{served}: {decision.reason}")
    minutes = (time.monotonic() - started) / 60
    rest = f", {image.name}" if drawn else " (no plot: matplotlib is not installed)"
    bars.echo(f"written in {minutes:.1f} min: {args.output}, {text.name}{rest}")
    bars.echo(f"kept for another --share or --router: {state.path.name}")
    bars.echo(f"use it with --attention-backend {FLUX.name} --profile {args.output}")
    return 0
