"""The API key on every route of vLLM's server, not only under ``/v1``.

vLLM 0.32 asks for the key under /v1, /v2, /inference and /cohere only; ``/invocations`` (which
answers completions), /generative_scoring, /tokenize, /scale_elastic_ep and /metrics stay open.
``vllm-ext serve`` adds this middleware whenever a key is set. With plain ``vllm serve``, add
``--middleware vllm_ext.access.RequireApiKey`` yourself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

MIDDLEWARE = "vllm_ext.access.RequireApiKey"
OPEN_PATHS = ("/health",)  # liveness probes carry no key; the answer is a bare status
_REFUSAL = {
    "error": {
        "message": "API key missing or wrong; send it as: Authorization: Bearer KEY",
        "type": "Unauthorized",
        "code": 401,
    }
}


def api_keys(args: Any) -> list[str]:
    """The keys a server accepts, as vLLM chooses them; empty when it asks for none.

    Args:
        args: vLLM's parsed arguments; ``--api-key`` wins over ``VLLM_API_KEY``.
    """
    return [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]


class RequireApiKey:
    """ASGI middleware for ``--middleware``: 401 without the key, on all routes but /health.

    A browser's preflight passes too: it cannot carry a key, and CORS answers it without
    reaching a route.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or passes the call on."""
        if scope["type"] not in ("http", "websocket") or _is_open(scope):
            return await self._app(scope, receive, send)
        keys = api_keys(scope["app"].state.args)
        if keys and not _has_key(scope, keys):
            return await JSONResponse(_REFUSAL, status_code=401)(scope, receive, send)
        return await self._app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    is_preflight = (
        scope.get("method") == "OPTIONS"
        and "origin" in headers
        and "access-control-request-method" in headers
    )
    path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
    return is_preflight or path in OPEN_PATHS


def _has_key(scope: Scope, keys: list[str]) -> bool:
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    # vLLM's own comparison (constant time): one definition of a valid key.
    verified: bool = AuthenticationMiddleware(None, keys).verify_token(Headers(scope=scope))
    return verified
