"""Valid and unusual requests for ``fuzz``: sampling options crossed, alone and together.

One by one they are what users send; what breaks is two of them in one batch, a prompt that takes
several chunks, an adapter beside the base model. Sizes are bounded: 600 tokens of prompt, eight
new ones, three sequences, four requests at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from deploy.chaos.fuzz_requests import HostileRequest

MAX_PROMPT_TOKENS = 600
MAX_TOGETHER = 4
NO_SEED = -1  # vLLM reads it as none
_JSON_TYPE = {"Content-Type": "application/json"}
_TEXT = (
    "the river was cold and the old stone bridge stood above a small town where nobody had seen "
    "snow for many years until one morning in late March when all of them woke to a white street"
)


@dataclass(frozen=True)
class OptionSpace:
    """What the server under test offers.

    Attributes:
        models: the base model's served name, then adapters'.
        chunk_tokens: its ``--max-num-batched-tokens``.
    """

    models: tuple[str, ...]
    chunk_tokens: int


@dataclass(frozen=True)
class Burst:
    """Requests that are sent at once.

    Attributes:
        requests: one to four.
        is_compared: the first is also asked alone, and must get the same answer.
    """

    requests: tuple[HostileRequest, ...]
    is_compared: bool


def _often(strategy: st.SearchStrategy[Any], one_in: int) -> st.SearchStrategy[Any]:
    """None, but for one draw in so many."""
    return st.integers(1, one_in).flatmap(lambda n: strategy if n == 1 else st.none())


_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "year": {"type": "integer"}},
    "required": ["city", "year"],
}
_GUIDED = st.sampled_from(
    [
        {"structured_outputs": {"json": _SCHEMA}},
        {"structured_outputs": {"json_object": True}},
        {"structured_outputs": {"regex": r"[a-c]{2,5}(, \d\d)?"}},
        {"structured_outputs": {"choice": ["Paris", "Parma", "no"]}},
        {"structured_outputs": {"grammar": 'root ::= "a" root | "b"'}},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "place", "schema": _SCHEMA},
            }
        },
    ]
)
_SEEDS = st.sampled_from([0, 1, 2, 12345, NO_SEED, 2**31, 2**63 - 1])
_TEMPERATURES = st.sampled_from([0, 0, 0.3, 1, 1, 2, 1e-3])
_SAMPLING: Mapping[str, st.SearchStrategy[Any]] = {
    "top_p": st.sampled_from([1.0, 0.9, 0.01]),
    "top_k": st.sampled_from([-1, 0, 1, 40, 60_000]),
    "min_p": st.sampled_from([0.0, 0.05, 1.0]),
    "presence_penalty": st.sampled_from([-2, 0.5, 2]),
    "frequency_penalty": st.sampled_from([-2, 0.5, 2]),
    "repetition_penalty": st.sampled_from([0.5, 1.1, 2.0]),
    "logit_bias": st.sampled_from([{"100": 100}, {"5": -100, "6": 3.5}, {}]),
    "min_tokens": st.integers(0, 3),
    "ignore_eos": st.booleans(),
    "stop": st.sampled_from([" ", ["\n", "the"], "absent", [], ["a", "b", "c", "d"]]),
    "stop_token_ids": st.sampled_from([[2], [0, 1, 2, 253], []]),
    "include_stop_str_in_output": st.booleans(),
    "bad_words": st.sampled_from([["the"], [" a", "Paris"]]),
    "allowed_token_ids": st.sampled_from([[5], list(range(1000, 1100))]),
    "skip_special_tokens": st.booleans(),
    "return_token_ids": st.booleans(),
}
_BEAMS = st.fixed_dictionaries(
    {"use_beam_search": st.just(True), "n": st.integers(1, 3), "temperature": st.just(0)},
    optional={"length_penalty": st.sampled_from([0.0, 1.0, 2.0])},
)
_XARGS = st.one_of(
    st.fixed_dictionaries({"sparse": st.sampled_from(["on", "off", "fast", "accurate"])}),
    st.fixed_dictionaries({"budget_tokens": st.sampled_from([128, 192, 512, 1 << 20])}),
    st.fixed_dictionaries({"budget_tokens": st.just(1), "sparse": st.just("on")}),
)


@st.composite
def _prompt_tokens(draw: st.DrawFn, chunk_tokens: int) -> list[int]:
    """Token ids; most prompts are a prefix of another one, or fork from it."""
    lengths = [1, 2, 31, 32, 33, 64, chunk_tokens - 1, chunk_tokens, chunk_tokens + 1]
    lengths += [2 * chunk_tokens, 2 * chunk_tokens + 33]
    length = draw(st.sampled_from([min(tokens, MAX_PROMPT_TOKENS) for tokens in lengths]))
    text = draw(st.integers(0, 1))
    ids = [1000 + (i * i * 31 + i * 17 + text * 4999) % 15_000 for i in range(max(1, length))]
    fork = draw(_often(st.integers(1, 9), 3))
    return ids if fork is None else [*ids[: -fork or None], *range(2000 + fork, 2000 + 2 * fork)]


@st.composite
def _prompt_text(draw: st.DrawFn, chunk_tokens: int) -> str:
    """Words, about a token each."""
    num_words = draw(st.sampled_from([1, 9, 33, chunk_tokens, 2 * chunk_tokens + 33]))
    start = draw(st.integers(0, 2))
    words = _TEXT.split() * (1 + MAX_PROMPT_TOKENS // len(_TEXT.split()))
    return " ".join(words[start : start + min(num_words, MAX_PROMPT_TOKENS)])


@st.composite
def _sampling(draw: st.DrawFn) -> dict[str, Any]:
    """What the routes have in common, by the names of vLLM's sampling parameters."""
    names = draw(st.sets(st.sampled_from(sorted(_SAMPLING)), max_size=4))
    temperature = draw(_TEMPERATURES)
    drawn = {
        "max_tokens": draw(st.integers(1, 8)),
        "temperature": temperature,
        "seed": draw(_often(_SEEDS, 2)),
        "n": draw(_often(st.integers(1, 3), 3)) if temperature else None,  # one is greedy
        "prompt_logprobs": draw(_often(st.sampled_from([0, 1, 5]), 5)),
        **{name: draw(_SAMPLING[name]) for name in sorted(names)},
    }
    return {name: value for name, value in drawn.items() if value is not None}


@st.composite
def _completion(draw: st.DrawFn, space: OptionSpace) -> tuple[str, dict[str, Any]]:
    tokens = _prompt_tokens(space.chunk_tokens)
    prompts = st.one_of(
        tokens, _prompt_text(space.chunk_tokens), st.lists(tokens, min_size=2, max_size=2)
    )
    body = {"prompt": draw(prompts), **draw(_sampling())}
    logprobs = draw(_often(st.sampled_from([0, 1, 5]), 3))
    if logprobs is not None:
        body["logprobs"] = logprobs
    beams = draw(_often(_BEAMS, 10))
    body |= {"echo": draw(st.integers(1, 5)) == 1} if beams is None else beams
    return "/v1/completions", body


@st.composite
def _chat(draw: st.DrawFn, space: OptionSpace) -> tuple[str, dict[str, Any]]:
    message = {"role": "user", "content": draw(_prompt_text(space.chunk_tokens))}
    body = {"messages": [message], **draw(_sampling())}
    top_logprobs = draw(_often(st.sampled_from([0, 1, 5]), 3))
    if top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": top_logprobs}
    body |= draw(_often(_BEAMS, 12)) or {}
    return "/v1/chat/completions", body


@st.composite
def _generate(draw: st.DrawFn, space: OptionSpace) -> tuple[str, dict[str, Any]]:
    sampling = draw(_sampling())
    sampling |= {"logprobs": draw(st.sampled_from([None, 0, 5]))}
    return "/inference/v1/generate", {
        "token_ids": draw(_prompt_tokens(space.chunk_tokens)),
        "sampling_params": sampling,
    }


@st.composite
def option_requests(draw: st.DrawFn, space: OptionSpace) -> HostileRequest:
    """One valid request (or nearly: some options exclude one another) with unusual options."""
    routes = [_completion(space), _completion(space), _chat(space), _chat(space), _generate(space)]
    path, body = draw(st.one_of(routes))
    body["model"] = draw(st.sampled_from(space.models))
    xargs = draw(_often(_XARGS, 4))
    if xargs is not None:
        if "sampling_params" in body:
            body["sampling_params"]["extra_args"] = xargs
        else:
            body["vllm_xargs"] = xargs
    if "sampling_params" not in body:
        body |= draw(_often(_GUIDED, 4)) or {}
    if draw(st.integers(1, 3)) == 1 and "use_beam_search" not in body:
        body["stream"] = True
        body |= draw(st.sampled_from([{}, {"stream_options": {"include_usage": True}}]))
    return HostileRequest("options", "POST", path, json.dumps(body).encode(), dict(_JSON_TYPE))


@st.composite
def bursts(draw: st.DrawFn, space: OptionSpace) -> Burst:
    """One to four requests at once; sometimes a client hangs up in the middle of its answer."""
    count = draw(st.sampled_from([1, 2, 2, 3, MAX_TOGETHER]))
    requests = [draw(option_requests(space)) for _ in range(count)]
    if draw(st.integers(1, 4)) == 1:
        hang_up_s = draw(st.sampled_from([0.02, 0.1, 0.3, 0.8]))
        requests[-1] = replace(requests[-1], hang_up_s=hang_up_s)
    requests.sort(key=lambda request: not is_repeatable(request) or bool(request.hang_up_s))
    first = requests[0]
    can_compare = first.hang_up_s is None and count > 1 and is_repeatable(first)
    return Burst(tuple(requests), can_compare)


def is_repeatable(request: HostileRequest) -> bool:
    """Whether asking again must give the same answer: greedy, or seeded."""
    body = json.loads(request.body or b"{}")
    sampling = body.get("sampling_params", body)
    return sampling.get("temperature") == 0 or sampling.get("seed") not in (None, NO_SEED)


def answer_of(text: str) -> list[tuple[int, str, list[int]]]:
    """What a 200 said, streamed or not: each sequence's text and token ids, in order.

    Args:
        text: the response's body.
    """
    if text.startswith("data:"):
        lines = (line.removeprefix("data:").strip() for line in text.splitlines())
        events = [json.loads(line) for line in lines if line and line != "[DONE]"]
    else:
        events = [json.loads(text)]
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}  # a stream may bring several at once
    for choice in (choice for event in events for choice in event.get("choices", [])):
        message = choice.get("message") or choice.get("delta") or {}
        index = choice["index"]
        piece = choice.get("text") or message.get("content") or ""
        texts[index] = texts.get(index, "") + piece
        ids.setdefault(index, []).extend(choice.get("token_ids") or [])
    return [(index, texts[index], ids[index]) for index in sorted(texts)]
