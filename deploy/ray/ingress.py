"""The HTTP side of the Ray application: ray.serve.llm's ingress with two middlewares.

ray.serve.llm checks no API key, and it ends a stream whose replica died like a complete one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_ext.access import RequireApiKey

KEY_ENV = "VLLM_API_KEY"  # where `vllm-ext serve` looks too
logger = logging.getLogger("ray.serve")


class ApiKey(RequireApiKey):
    """The key check of ``vllm-ext serve``, with the key from this process's environment.

    FastAPI serves /docs, /redoc and /openapi.json beside what is under ``/v1``: vLLM's own check
    would leave them open. The key is read where the ingress runs, so that it is neither in a YAML
    file nor in Ray's storage.

    Args:
        app: what is guarded.
        is_required: whether a missing key is an error or an open server.

    Raises:
        RuntimeError: a key is required and there is none.
    """

    def __init__(self, app: ASGIApp, is_required: bool) -> None:
        if is_required and not os.environ.get(KEY_ENV):
            raise RuntimeError(
                f"require_api_key is true, but {KEY_ENV} is not set where the ingress runs; set "
                "it in the environment of `ray start` (Kubernetes: from a secret, as in "
                "deploy/ray/kuberay-rayservice.yaml)"
            )
        super().__init__(app)


class CutStreams:
    """Ends a stream that broke off with an error event and without ``[DONE]``.

    The status is sent by then, so that an event is the only way to say it; OpenAI's clients
    raise on it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on; adds the event where the application raised in a stream."""
        is_stream = False
        last: Message | None = None

        async def watch(message: Message) -> None:
            nonlocal is_stream, last
            if message["type"] == "http.response.start":
                content_type = dict(message["headers"]).get(b"content-type", b"")
                is_stream = content_type.startswith(b"text/event-stream")
            elif is_stream and not message.get("more_body"):
                # Starlette's middlewares close the body first and raise afterwards.
                last = message
                return
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if not is_stream:
                raise
            logger.warning("a stream broke off: %r", error)
            last = {"type": "http.response.body", "body": _error_event(error)}
        if last is not None:
            await send(last)


def _error_event(error: Exception) -> bytes:
    reason = {
        "message": f"the replica failed while it answered ({type(error).__name__}); ask again",
        "type": "replica_failed",
        "code": 503,
    }
    return f"data: {json.dumps({'error': reason})}\n\n".encode()


def _list_models(app: FastAPI, requires_key: bool) -> Any:
    # An endpoint's factory is where ray.serve.llm hands out its app. What is added last
    # runs first: the key is checked before the body is read.
    app.state.args = argparse.Namespace(api_key=None)  # where the check looks before KEY_ENV
    app.add_middleware(CutStreams)
    app.add_middleware(ApiKey, is_required=requires_key)
    return app.get("/v1/models")


def endpoints(requires_key: bool) -> dict[str, Callable[[FastAPI], Any]]:
    """For ``make_fastapi_ingress``: what is served; methods of ours serve text generation."""
    return {
        "models": partial(_list_models, requires_key=requires_key),
        "model_data": lambda app: app.get("/v1/models/{model:path}"),
        "completions": lambda app: app.post("/v1/completions"),
        "chat": lambda app: app.post("/v1/chat/completions"),
    }
