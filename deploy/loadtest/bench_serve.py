"""vLLM's ``vllm bench serve`` in a process of its own.

The CPU wheel's ``vllm`` command cannot be used (it crashes on a metadata look-up), and
importing it takes ten seconds, so that one process runs all cells of an arm.

A request is a list of command-line words of ``vllm bench serve``; the answer is
``{"result": {...}}`` or ``{"failure": "..."}``.
"""

from __future__ import annotations

import traceback
from typing import Any

from vllm_ext.child import Parent

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


def _main(parent: Parent) -> None:
    for words in parent:
        parent.answer(_answer(words))


if __name__ == "__main__":
    _main(Parent())
