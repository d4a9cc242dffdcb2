"""``vllm-ext``: doctor, demo-model, methods, serve, profile, eval, bench."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from attn_backends.config import ConfigError
from vllm_ext import __version__
from vllm_ext.errors import UserError

COMMANDS = {  # in the order of --help: the first four are a newcomer's
    "doctor": ("vllm_ext.cli.doctor", "check this machine with a self-test decode"),
    "demo-model": ("vllm_ext.demo_model", "prepare the demo model"),
    "methods": ("vllm_ext.cli.methods", "what each method reads, frees and cannot do"),
    "serve": ("vllm_ext.cli.serve", "start an OpenAI-compatible server"),
    "profile": ("vllm_ext.cli.profile", "calibrate TIDAL_DECODE, MOA or FLUX for a checkpoint"),
    "eval": ("vllm_ext.cli.eval", "fidelity of the methods against dense"),
    "bench": ("vllm_ext.cli.bench", "decode time, capacity and kernels, against stock vLLM"),
}
EPILOG = """
new here? these four, in this order:

  vllm-ext doctor
  vllm-ext demo-model
  vllm-ext methods
  vllm-ext serve models/smollm2-135m-instruct --attention-backend TIDAL_DECODE

`vllm-ext COMMAND --help` says more of each
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the ``vllm-ext`` command.

    Returns:
        The exit code: 0, or 2 for a user error (one line on stderr).
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="vllm-ext",
        description="Cheap long-context decoding on vLLM 0.32.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vllm-ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    # Only the chosen command is imported: `methods` must not wait for vLLM.
    args, rest = parser.parse_known_args(argv[:1]) if argv else parser.parse_known_args([])
    module = import_module(COMMANDS[args.command][0])
    try:
        return int(module.main([*rest, *argv[1:]]))
    except (ConfigError, UserError) as error:
        print(f"vllm-ext {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
