"""``vllm-ext profile MODEL``: calibrates a method, each by a command of its own."""

from __future__ import annotations

import argparse

from vllm_ext.cli import profile_anchors, profile_flux, profile_moa
from vllm_ext.errors import UserError

CALIBRATORS = {
    "tidal_decode": profile_anchors.main,
    "moa": profile_moa.main,
    "flux": profile_flux.main,
}
DEFAULT = "tidal_decode"


def main(argv: list[str]) -> int:
    """Hands the other arguments to the method's command.

    Raises:
        UserError: a method that has none, or what the command refuses.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", default=DEFAULT)
    asked, rest = parser.parse_known_args(argv)
    calibrator = CALIBRATORS.get(asked.method.lower())
    if calibrator is None:
        raise UserError(f"--method is {asked.method!r}; choose one of {', '.join(CALIBRATORS)}")
    return calibrator(rest)
