"""vLLM's ``vllm bench serve`` in a process of its own, driven by JSON lines.

The CPU wheel's ``vllm`` command cannot be used (it crashes on a metadata look-up), and
importing it takes ten seconds, so that one process runs all cells of an arm.

A line on standard input is a list of command-line words of ``vllm bench serve``; the answer is
a marked line on standard output: ``{"result": {...}}`` or ``{"failure": "..."}``. What the
benchmark prints itself goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from typing import Any

MARK = "@@vllm-ext-bench "
# Lists that nobody reads here and that may hold megabytes of text.
_LEFT_OUT = ("generated_texts", "start_times", "queue_times", "ttfts", "itls", "latencies")


def _answer(words: list[str]) -> dict[str, Any]:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    serve.add_cli_args(parser)
    try:
        result = serve.main(parser.parse_args(words))
    except (Exception, SystemExit):  # the parent reports it and goes on with the next cell
        return {"failure": traceback.format_exc()}
    return {"result": {key: value for key, value in result.items() if key not in _LEFT_OUT}}


def main() -> None:
    """Answers until standard input closes."""
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            answer = _answer(json.loads(line))
        print(MARK + json.dumps(answer, default=float), flush=True)


if __name__ == "__main__":
    main()
