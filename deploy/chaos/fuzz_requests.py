"""Hostile requests for ``fuzz``: what is sent, independent of how it is sent.

Three of four kinds: bodies made from the server's own OpenAPI schema (valid and invalid), valid
bodies with a few fields replaced by hostile values, and raw bytes that are no request at all; what
is valid and unusual is in ``fuzz_options``. Every body is bounded (``bounded``), so that no
request generates more than a few tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

MAX_NEW_TOKENS = 4
MAX_PARALLEL = 2  # sequences of one request
_LENGTH_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
_PARALLEL_FIELDS = ("n", "best_of")
_LENGTH_OF = {"prompt": "max_tokens", "messages": "max_tokens", "input": "max_output_tokens"}


@dataclass(frozen=True)
class HostileRequest:
    """One request as it goes over the wire.

    Attributes:
        kind: the generator that made it: ``schema``, ``mutated``, ``raw`` or ``options``.
        method: of HTTP.
        path: with its query string.
        body: raw bytes, or None for none.
        headers: without Content-Length and Authorization.
        hang_up_s: how long the client waits before it closes the connection, or None.
    """

    kind: str
    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    hang_up_s: float | None = None


def bounded(value: Any) -> Any:
    """A JSON value in which no field asks for more than a few tokens or sequences.

    Values that are no number stay: refusing them is the server's business.
    """
    if isinstance(value, list):
        return [bounded(item) for item in value]
    if not isinstance(value, dict):
        return value
    result = {key: bounded(item) for key, item in value.items()}
    for key in _LENGTH_FIELDS:
        if _exceeds(result.get(key), MAX_NEW_TOKENS):
            result[key] = MAX_NEW_TOKENS
    for key in _PARALLEL_FIELDS:
        if _exceeds(result.get(key), MAX_PARALLEL):
            result[key] = MAX_PARALLEL
    for content, key in _LENGTH_OF.items():
        if content in result and result.get(key) is None:
            result[key] = MAX_NEW_TOKENS
    sampling = result.get("sampling_params")
    if isinstance(sampling, dict) and sampling.get("max_tokens") is None:
        sampling["max_tokens"] = MAX_NEW_TOKENS  # its default is the rest of the context
    return result


def _exceeds(value: Any, limit: int) -> bool:
    if isinstance(value, str):  # pydantic reads "100" as 100
        try:
            value = float(value)
        except ValueError:
            return False
    return isinstance(value, int | float) and not isinstance(value, bool) and value > limit


def valid_bodies(model: str) -> dict[str, dict[str, Any]]:
    """A small valid body for every route that takes one, by path."""
    chat = {"model": model, "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 3}
    completion = {"model": model, "prompt": "Once upon a time", "max_tokens": 3}
    answer = {
        "model": model,
        "input": "Say hi.",
        "max_output_tokens": 3,
    }
    score = {"model": model, "query": "a", "items": ["b", "c"], "label_token_ids": [5, 6]}
    generate = {
        "model": model,
        "token_ids": [10, 11, 12],
        "sampling_params": {"max_tokens": 3, "temperature": 0.0},
    }
    return {
        "/v1/chat/completions": chat,
        "/v1/completions": completion,
        "/v1/responses": answer,
        "/v1/messages": chat,
        "/v1/messages/count_tokens": chat,
        "/v1/chat/completions/batch": {**chat, "messages": [chat["messages"]] * 2},
        "/v1/chat/completions/render": chat,
        "/v1/completions/render": completion,
        "/inference/v1/generate": generate,
        "/inference/v1/abort_requests": {"request_ids": ["none"]},
        "/invocations": completion,
        "/generative_scoring": score,
        "/tokenize": {"model": model, "prompt": "hello"},
        "/detokenize": {"model": model, "tokens": [10, 11]},
        "/scale_elastic_ep": {"new_data_parallel_size": 1},
    }


_KNOWN_FIELDS = [
    "model", "prompt", "messages", "input", "max_tokens", "temperature", "top_p", "top_k", "min_p",
    "n", "best_of", "stop", "seed", "stream", "stream_options", "logprobs", "top_logprobs",
    "prompt_logprobs", "echo", "suffix", "logit_bias", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "allowed_token_ids",
    "bad_words", "response_format", "structured_outputs", "tools", "tool_choice", "chat_template",
    "chat_template_kwargs", "continue_final_message", "add_generation_prompt",
    "truncate_prompt_tokens", "priority", "request_id", "cache_salt", "kv_transfer_params",
    "logits_processors", "use_beam_search", "length_penalty", "skip_special_tokens",
    "spaces_between_special_tokens", "return_token_ids", "return_tokens_as_token_ids",
    "prompt_embeds", "user", "reasoning_effort", "token_ids", "tokens", "items", "query",
    "label_token_ids", "sampling_params", "system", "thinking", "features", "mm_processor_kwargs",
    "vllm_xargs",
]  # fmt: skip

_TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["", "\x00", "\ud800", "a\u0000b", "🧨" * 50, "\u202e\u200b", "<|im_end|>", "{{7*7}}",
         "{% for i in range(99999999) %}x{% endfor %}", "../../etc/passwd", "%s%n", "1e999"]
    ),
)  # fmt: skip
_NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.integers(-5, 60_000),
    st.floats(allow_nan=True),
)
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(_KNOWN_FIELDS), _TEXTS), inner, max_size=4),
    ),
    max_leaves=8,
)
_XARGS_VALUES = st.one_of(
    st.sampled_from(
        [512, 96, 95, 1, 0, -1, 1 << 20, (1 << 20) + 1, 1 << 62, 10**30, 512.0, 0.1, "512", "",
         "on", "off", "fast", "accurate", "FAST", "turbo", True, False, None, [512], ["off"], [],
         float("nan"), float("inf"), {"a": 1}, [[1]], "\ud800", "x" * 10_000]
    ),
    _VALUES,
)  # fmt: skip
_XARGS = st.one_of(
    st.dictionaries(
        st.sampled_from(["sparse", "budget_tokens", "sink_tokens", "window_tokens", "session_id",
                         "kv_transfer_params", "kv_cache_report_mode", "", "budget-tokens"]),
        _XARGS_VALUES, min_size=1, max_size=3,
    ),
    _VALUES,
)  # fmt: skip


@st.composite
def mutated_requests(draw: st.DrawFn, model: str) -> HostileRequest:
    """A valid body with one to three fields replaced, a third of them in ``vllm_xargs``."""
    path, body = draw(st.sampled_from(sorted(valid_bodies(model).items())))
    body = dict(body)
    if draw(st.integers(0, 2)) == 0:
        xargs = draw(_XARGS)
        if "sampling_params" in body:
            body["sampling_params"] = {**body["sampling_params"], "extra_args": xargs}
        else:
            body["vllm_xargs"] = xargs
    else:
        names = st.one_of(st.sampled_from(sorted(body)), st.sampled_from(_KNOWN_FIELDS))
        for name in draw(st.lists(names, min_size=1, max_size=3)):
            target = body
            if isinstance(body.get("sampling_params"), dict) and draw(st.booleans()):
                target = body["sampling_params"] = dict(body["sampling_params"])
            target[name] = draw(_VALUES)
    if draw(st.integers(0, 3)) == 0:
        body["stream"] = True
    return HostileRequest(
        "mutated",
        "POST",
        path,
        json.dumps(bounded(body)).encode(),
        {"Content-Type": "application/json"},
    )


def raw_requests(model: str, max_model_len: int) -> Iterator[HostileRequest]:
    """Bodies that are not JSON, are too long or too deep, and calls nobody should make."""
    bodies = valid_bodies(model)
    completion = json.dumps(bodies["/v1/completions"]).encode()
    not_json: list[tuple[bytes, str]] = [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"null", "application/json"),
        (b"[]", "application/json"),
        (b'"text"', "application/json"),
        (b"NaN", "application/json"),
        (b"\xff\xfe\x00", "application/json"),
        (b"\xef\xbb\xbf" + completion, "application/json"),
        (completion.replace(b'"Once', b'"\xc3\x28Once'), "application/json"),
        (completion[:-1] + b', "prompt": "twice"}', "application/json"),
        (completion[:-1] + b', "temperature": NaN}', "application/json"),
        (completion[:-1] + b', "prompt": "\\ud800"}', "application/json"),
        (completion[:-1] + b', "seed": ' + b"9" * 5000 + b"}", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"prompt":' * 20_000 + b"1" + b"}" * 20_000, "application/json"),
        (completion, "text/plain"),
        (completion, "application/x-www-form-urlencoded"),
        (completion, "multipart/form-data; boundary=x"),
        (completion, "application/json; charset=utf-16"),
        (completion, ""),
        (completion.decode().encode("utf-16"), "application/json"),
    ]
    for path in sorted(bodies):
        for body, media_type in not_json:
            yield HostileRequest("raw", "POST", path, body, {"Content-Type": media_type})
        yield HostileRequest("raw", "DELETE", path)
    yield from _too_long(model, max_model_len)
    for path in ("/v1/responses/x", "/v1/responses/%00", "/%2e%2e/etc/passwd", "//", "/v1/models/"):
        yield HostileRequest("raw", "GET", path)
    yield HostileRequest("raw", "GET", "/v1/models", headers={"X-Long": "x" * 60_000})
    yield HostileRequest("raw", "GET", "/metrics?name[]=" + "x" * 5000)


def _too_long(model: str, max_model_len: int) -> Iterator[HostileRequest]:
    json_type = {"Content-Type": "application/json"}
    prompts: list[Any] = [
        "word " * (max_model_len + 1),
        "word " * 400_000,
        [5] * (max_model_len + 1),
        [5] * max_model_len,
        [10**9],
        [-1],
        [2**70],
        [[5], [10**9]],
        [],
        [[]],
        "",
    ]
    for prompt in prompts:
        body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 2}).encode()
        yield HostileRequest("raw", "POST", "/v1/completions", body, json_type)
    message = {"role": "user", "content": "word " * (max_model_len + 1)}
    chat = {"model": model, "messages": [message], "max_tokens": 2}
    yield HostileRequest(
        "raw", "POST", "/v1/chat/completions", json.dumps(chat).encode(), json_type
    )


def schema_requests(
    url: str, headers: dict[str, str]
) -> list[tuple[str, st.SearchStrategy[HostileRequest]]]:
    """Labelled strategies: what each operation of /openapi.json allows, and what it forbids.

    Args:
        url: the server's, without a slash at the end.
        headers: for fetching the schema.
    """
    import requests
    import schemathesis

    def as_request(case: Any) -> HostileRequest:
        prepared: Any = requests.Request(**case.as_transport_kwargs(base_url=url)).prepare()
        body = prepared.body.encode() if isinstance(prepared.body, str) else prepared.body
        media_type = prepared.headers.get("Content-Type")
        return HostileRequest(
            "schema",
            str(prepared.method),
            str(prepared.url).removeprefix(url),
            _bounded_bytes(body) if body else None,
            {"Content-Type": media_type} if media_type else {},
        )

    schema = schemathesis.openapi.from_url(url + "/openapi.json", headers=headers)
    return [
        (
            f"{operation.label}, {mode.value}",
            operation.as_strategy(generation_mode=mode).map(as_request),
        )
        for operation in (result.ok() for result in schema.get_all_operations())
        for mode in schemathesis.GenerationMode
    ]


def _bounded_bytes(body: bytes) -> bytes:
    try:
        return json.dumps(bounded(json.loads(body))).encode()
    except (ValueError, RecursionError):
        return body  # not JSON: sent as it is
