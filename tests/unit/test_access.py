"""The API key on every route."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ext import access
from vllm_ext.cli.serve import require_key_everywhere
from vllm_ext.errors import UserError

KEY = "right"


def _status(path: str, keys: list[str] | None, **scope: Any) -> int:
    """Status of one call through the middleware; 200 when it reaches the app."""
    headers = scope.pop("headers", {})
    state = SimpleNamespace(args=SimpleNamespace(api_key=keys))
    full = {
        "type": "http",
        "method": "GET",
        "path": path,
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "app": SimpleNamespace(state=state),
        **scope,
    }
    seen: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(200)

    async def send(message: dict[str, Any]) -> None:
        seen.extend([message["status"]] if "status" in message else [])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    asyncio.run(access.RequireApiKey(app)(full, receive, send))
    return seen[0]


@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/invocations", "/tokenize", "/metrics", "/scale_elastic_ep", "/",
     "/health/", "/healthz", "//health", "/openapi.json"],
)  # fmt: skip
def test_every_route_but_health_needs_the_key(path: str) -> None:
    assert _status(path, [KEY]) == 401
    assert _status(path, [KEY], headers={"authorization": "Bearer wrong"}) == 401
    assert _status(path, [KEY], headers={"authorization": KEY}) == 401
    assert _status(path, [KEY], headers={"authorization": f"Bearer {KEY}"}) == 200
    assert _status(path, ["other", KEY], headers={"authorization": f"bearer {KEY}"}) == 200


def test_health_stays_open_under_a_root_path_too() -> None:
    assert _status("/health", [KEY]) == 200
    assert _status("/api/health", [KEY], root_path="/api") == 200
    assert _status("/api/metrics", [KEY], root_path="/api") == 401


def test_only_a_preflight_may_use_options() -> None:
    assert _status("/metrics", [KEY], method="OPTIONS") == 401
    headers = {"origin": "http://x", "access-control-request-method": "POST"}
    assert _status("/v1/completions", [KEY], method="OPTIONS", headers=headers) == 200


def test_websockets_need_it_too() -> None:
    assert _status("/v1/realtime", [KEY], type="websocket", extensions={}) == 401


def test_without_a_key_everything_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert _status("/metrics", None) == 200
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert _status("/metrics", None) == 401


def test_serve_adds_it_once_and_only_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    args = SimpleNamespace(api_key=None, middleware=["mine.Other"])
    require_key_everywhere(args)
    assert args.middleware == ["mine.Other"]
    args.api_key = [KEY]
    require_key_everywhere(args)
    require_key_everywhere(args)
    assert args.middleware == ["mine.Other", access.MIDDLEWARE]


def test_front_ends_that_would_not_ask_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args = SimpleNamespace(api_key=[KEY], middleware=[], grpc=True)
    with pytest.raises(UserError, match="--grpc starts a front end"):
        require_key_everywhere(args)
    args.grpc = False
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UserError, match="VLLM_USE_RUST_FRONTEND"):
        require_key_everywhere(args)
