"""``vllm-ext serve`` where the registry has one more line.

The line stands at the top level: processes that are spawned import their parent's main module
first, and so have it, too.
"""

from __future__ import annotations

import sys

from attn_backends.methods import REGISTRY
from tests.toy_method import LINE, NAME
from vllm_ext.cli import main

REGISTRY[NAME] = LINE

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
