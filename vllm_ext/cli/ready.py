"""The line that a server prints when it answers, with a command to try it."""

from __future__ import annotations

import json
import os
import shlex
import time
import urllib.error
import urllib.request
from typing import Any


def curl_line(args: Any) -> str:
    """A command that asks the server a question; the API key stays in the environment."""
    model = args.served_model_name[0] if args.served_model_name else args.model
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 32,
        "temperature": 0,
    }
    has_key = bool(args.api_key or os.environ.get("VLLM_API_KEY"))
    auth = ' -H "Authorization: Bearer $VLLM_API_KEY"' if has_key else ""
    url = f"http://{_reachable(args.host)}:{args.port}/v1/chat/completions"
    data = shlex.quote(json.dumps(body))
    return f"curl -s {url} -H 'Content-Type: application/json'{auth} -d {data}"


def announce_when_ready(args: Any) -> None:
    """Waits for /health, then prints; runs in a thread of its own."""
    url = f"http://{_reachable(args.host)}:{args.port}/health"
    while True:
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(url, timeout=2):
                break
        except (urllib.error.URLError, OSError):
            continue
    backend = args.attention_backend
    name = getattr(backend, "name", backend) or "vLLM's own choice"
    print(
        f"\nvllm-ext: ready on http://{_reachable(args.host)}:{args.port} "
        f"(attention backend: {name}). Try it:\n\n  {curl_line(args)}\n",
        flush=True,
    )


def _reachable(host: str | None) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]", None: "127.0.0.1"}.get(host, str(host))
