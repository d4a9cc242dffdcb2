"""Per-request options: validation, and the way from request ids to rows."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.sampling_params import BeamSearchParams

from attn_backends.adapter.requests import RequestBook, parse_options
from attn_backends.batch import RowOptions
from attn_backends.methods import load_method
from kvcache.spans import EVERYTHING_TOKENS

TIDAL = load_method("TIDAL_DECODE")


def test_options_are_read_and_others_left_alone() -> None:
    assert parse_options(None, TIDAL, 96) is None
    assert parse_options({"other": 1}, TIDAL, 96) is None
    assert parse_options({"sparse": "off"}, TIDAL, 96) == RowOptions(is_dense=True)
    assert parse_options({"sparse": "fast"}, TIDAL, 96) == RowOptions(budget_factor=0.5)
    assert parse_options({"budget_tokens": 96}, TIDAL, 96) == RowOptions(budget_tokens=96)


@pytest.mark.parametrize(
    ("extra_args", "words"),
    [
        ({"sparse": "maybe"}, "'maybe'"),
        ({"sparse": 0}, "sparse is 0"),
        ({"sparse": ["off"]}, "one of on, off, fast, accurate"),
        ({"sparse": "off", "budget_tokens": 512}, "give one of them"),
        ({"budget_tokens": 95}, "between 96 and"),
        ({"budget_tokens": -1}, "budget_tokens is -1"),
        ({"budget_tokens": "512"}, "'512'"),
        ({"budget_tokens": 1.5}, "1.5"),
        ({"budget_tokens": 1 << 60}, "between 96 and"),
        ({"budget_tokens": [512]}, "512"),
        ({"budget_tokens": float("nan")}, "nan"),
        ({"budget_tokens": {"a": 1}}, "{'a': 1}"),
        ({"budget_tokens": True}, "True"),
        ({"sparse": {"preset": "fast"}}, "'preset'"),
        ({"min_context_tokens": 0}, "--min-context-tokens"),
        ({"strict": False, "budget_tokens": 512}, "--strict"),
    ],
)
def test_absurd_values_are_errors_that_say_what_works(
    extra_args: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match="vllm_xargs") as error:
        parse_options(extra_args, TIDAL, 96)
    assert words in str(error.value)


def test_methods_without_options_refuse_them() -> None:
    with pytest.raises(ValueError, match=r"SPARSE_FULL takes no .*: TIDAL_DECODE, ORACLE"):
        parse_options({"budget_tokens": 512}, load_method("SPARSE_FULL"), 1)
    switched = replace(TIDAL, row_options=frozenset({"sparse"}))
    assert parse_options({"sparse": "off"}, switched, 1) == RowOptions(is_dense=True)
    with pytest.raises(ValueError, match="has budget_tokens, but TIDAL_DECODE takes only sparse;"):
        parse_options({"sparse": "on", "budget_tokens": 512}, switched, 1)
    with pytest.raises(ValueError, match=r"window_tokens is 64.*--window-tokens"):
        parse_options({"window_tokens": 64}, load_method("SINK_WINDOW"), 1)


def _step(new: dict[str, Any] | None = None, finished: tuple[str, ...] = ()) -> Any:
    requests = [
        SimpleNamespace(req_id=name, sampling_params=SamplingParams(extra_args=extra))
        for name, extra in (new or {}).items()
    ]
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=requests,
        num_scheduled_tokens=dict.fromkeys(new or {}, 1),
    )


def test_the_book_follows_requests_through_reordering_and_the_end() -> None:
    book = RequestBook()
    book.update(_step({"a": None, "b": {"budget_tokens": 128}, "c": {"sparse": "off"}}))
    of_b, of_c = RowOptions(budget_tokens=128), RowOptions(is_dense=True)
    assert book.of_rows(["a", "b", "c"]) == {1: of_b, 2: of_c}
    assert book.of_rows(["c", "a"]) == {0: of_c}
    book.update(_step(finished=("c",)))
    assert book.of_rows(["b", None, "a"]) == {0: of_b}
    book.update(_step({"b": None}, finished=("b",)))  # an id may come back as another request
    assert book.of_rows(["b", "a"]) == {}


def test_rows_are_requests_within_a_step_of_the_scheduler_alone() -> None:
    book = RequestBook()
    book.row_ids = lambda places: ["left over", "b", "c"] if places is None else list("xyz")
    assert (book.num_rows, book.ids_of_rows(2)) == (0, ())
    with book.step(_step({"a": None, "b": None})):
        assert (book.num_rows, book.ids_of_rows(1)) == (2, ["left over"])
        assert book.ids_of_rows(8) == ["left over", "b"], "the rest is a graph's padding"
        assert book.ids_of_rows(8, [4, 0, 7]) == ["x", "y"]
    assert (book.num_rows, book.ids_of_rows(2)) == (0, ())
    with pytest.raises(RuntimeError, match="in a step"), book.step(_step({"c": None})):
        raise RuntimeError("in a step")
    assert book.num_rows == 0


def test_drafts_are_of_the_step_before_them() -> None:
    book = RequestBook()
    book.row_ids = lambda places: ["a", "b"] if places is None else [f"at {p}" for p in places]
    with book.step(_step({"a": None, "b": None})):
        pass
    with book.sampling():
        assert book.ids_of_rows(2) == ["a", "b"]
        assert book.ids_of_rows(1, [1]) == ["at 1"]
    with book.sampling():
        assert book.ids_of_rows(2) == (), "nothing was computed since"


def test_the_options_of_a_sessions_later_chunk_are_its_own() -> None:
    book = RequestBook()
    book.update(_step({"a": {"budget_tokens": 128}}))
    book.update(_step({"a": {"sparse": "off"}}))
    assert book.of_rows(["a"]) == {0: RowOptions(is_dense=True)}
    book.update(_step({"a": None}))
    assert book.of_rows(["a"]) == {}


def test_where_prompts_end_is_what_a_request_began_with() -> None:
    """The KV manager frees by it, so that a session's later chunks cannot change it."""
    book = RequestBook()
    book.update(_step({"unasked": None}))  # nobody follows prompts: their tokens are not looked at
    book.follow_prompts()

    def step(tokens: dict[str, int], extra: Any = None, finished: tuple[str, ...] = ()) -> Any:
        output = _step(dict.fromkeys(tokens, extra), finished)
        for request in output.scheduled_new_reqs:
            request.prompt_token_ids = [7] * tokens[request.req_id]
            request.prompt_embeds = None
        return output

    book.update(step({"a": 5, "b": 9}))
    book.update(step({"c": 3}, {"sparse": "off"}))
    assert book.dense_until(["b", "c", None, "a"], 6) == [9, EVERYTHING_TOKENS, None, 5, None, None]
    book.update(step({"a": 50}, {"sparse": "off"}))  # a session's next chunk
    assert book.dense_until(["a"], 2) == [5, None]
    with pytest.raises(RuntimeError, match="unasked"):  # what it may read is not known
        book.dense_until(["a", "unasked"], 2)
    book.update(step({"a": 50}, finished=("a", "b")))  # another request under the same id
    assert book.dense_until(["a"], 1) == [50]


def test_every_builder_learns_that_requests_ended() -> None:
    book = RequestBook()
    first, second = book.ended_requests(), book.ended_requests()
    book.update(_step(finished=("a",)))
    assert first.take() == ["a"]
    book.update(_step(finished=("b",)))
    assert (first.take(), second.take()) == (["b"], ["a", "b"])
    assert second.take() == []
    del second
    gc.collect()
    assert len(book._readers) == 1  # an engine that is gone leaves nothing to fill


def test_steps_of_a_beam_search_are_counted_as_vllm_asks_for_them() -> None:
    """Front ends are recorded: what they ask the engine for is what the book must know."""
    asked: list[Any] = []

    class Engine:
        input_processor = SimpleNamespace(resolve_watermarking=lambda params: None)

        def generate(self, prompt: Any, params: Any, request_id: str, **kwargs: Any) -> Any:
            asked.append(params)
            raise RuntimeError("asked")

    class FrontEnd(BeamSearchOnlineMixin):
        renderer = SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(eos_token_id=2))  # type: ignore[assignment]
        engine_client = Engine()  # type: ignore[assignment]

    async def ask() -> None:
        prompt: Any = {"type": "token", "prompt_token_ids": [1, 2, 3]}
        params = BeamSearchParams(beam_width=2, max_tokens=4)
        async for _ in FrontEnd().beam_search(prompt, "r", params):
            pass

    with pytest.raises(RuntimeError, match="asked"):
        asyncio.run(ask())
    book = RequestBook()
    others = [
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=1, logprobs=4),
        SamplingParams(max_tokens=1, detokenize=False),
        SamplingParams(max_tokens=8, logprobs=4, detokenize=False),
    ]
    requests = [SimpleNamespace(req_id=str(i), sampling_params=p) for i, p in enumerate(others)]
    requests += [SimpleNamespace(req_id="pooling", sampling_params=None)]
    book.update(SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=requests))  # type: ignore[arg-type]
    assert book.take_beam_steps() == 0
    requests = [SimpleNamespace(req_id="beam", sampling_params=asked[0])]
    book.update(SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=requests))  # type: ignore[arg-type]
    assert (book.take_beam_steps(), book.take_beam_steps()) == (1, 0)


def test_presets_of_the_server_are_known_to_front_end_and_worker() -> None:
    presets = {"deep": RowOptions(budget_tokens=2048)}
    assert parse_options({"sparse": "deep"}, TIDAL, 96, presets) == presets["deep"]
    with pytest.raises(ValueError, match="one of on, off, deep"):
        parse_options({"sparse": "fast"}, TIDAL, 96, presets)
    with pytest.raises(ValueError, match="give one of them"):
        parse_options({"sparse": "deep", "budget_tokens": 512}, TIDAL, 96, presets)
    book = RequestBook()
    book.presets = presets
    book.update(_step({"a": {"sparse": "deep"}, "b": {"sparse": "on"}}))
    assert book.of_rows(["a", "b"]) == {0: presets["deep"], 1: RowOptions()}
