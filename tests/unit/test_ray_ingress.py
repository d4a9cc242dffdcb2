"""The ingress's middlewares on a small app: keys, and streams that break off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from deploy.chaos.faults import ANSWER, CUT, ERROR, judge_stream
from deploy.ray.ingress import KEY_ENV, endpoints


def _app(requires_key: bool = False) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def _as_ray_has_one(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    routes = endpoints(requires_key)

    async def models() -> dict[str, str]:
        return {"object": "list"}

    async def chat(breaks: bool = False) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            yield "data: {}\n\n"
            if breaks:
                raise RuntimeError("the actor died")
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    routes["models"](app)(models)
    routes["chat"](app)(chat)
    return app


def _ask(app: FastAPI, method: str, path: str, key: str | None = None) -> httpx.Response:
    async def ask() -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(ask())


def test_the_key_of_the_environment_is_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "secret")
    app = _app(requires_key=True)
    assert _ask(app, "GET", "/v1/models").status_code == 401
    assert _ask(app, "GET", "/v1/models", key="wrong").status_code == 401
    assert _ask(app, "POST", "/v1/chat/completions", key="wrong").status_code == 401
    assert _ask(app, "GET", "/v1/models", key="secret").status_code == 200


@pytest.mark.parametrize(
    "path", ["/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/x"]
)
def test_the_schema_asks_for_the_key_too(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "secret")
    app = _app(requires_key=True)
    assert _ask(app, "GET", path).status_code == 401
    assert _ask(app, "GET", path, key="secret").status_code == (404 if path == "/x" else 200)


def test_a_required_key_that_is_missing_stops_the_ingress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)
    assert _ask(_app(), "GET", "/v1/models").status_code == 200
    with pytest.raises(RuntimeError, match=KEY_ENV):
        _ask(_app(requires_key=True), "GET", "/v1/models")


def test_a_stream_that_breaks_off_ends_in_an_error_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV, raising=False)
    whole = _ask(_app(), "POST", "/v1/chat/completions")
    assert judge_stream(whole.text.splitlines()) == (ANSWER, "")
    cut = _ask(_app(), "POST", "/v1/chat/completions?breaks=true")
    assert cut.status_code == 200
    outcome, detail = judge_stream(cut.text.splitlines())
    assert outcome == ERROR
    assert "RuntimeError" in detail
    assert "[DONE]" not in cut.text


def test_a_stream_without_done_is_cut() -> None:
    assert judge_stream(['data: {"choices": []}', ""])[0] == CUT
    assert judge_stream([])[0] == CUT
