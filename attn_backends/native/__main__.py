"""``python -m attn_backends.native``: build the CPU kernels ahead of the first start."""

from __future__ import annotations

import logging
import sys

from attn_backends.native import NativeBuildError, build

logging.basicConfig(format="%(message)s")
try:
    print(f"CPU kernels: {build()}")
except NativeBuildError as error:
    sys.exit(f"error: {error}")
