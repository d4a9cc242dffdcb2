"""Per-request options: validation, and the way from request ids to rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from attn_backends.adapter.requests import RequestBook, parse_options
from attn_backends.batch import RowOptions
from attn_backends.methods import load_method

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
    with pytest.raises(ValueError, match="SPARSE_FULL takes no per-request options"):
        parse_options({"budget_tokens": 512}, load_method("SPARSE_FULL"), 1)
    with pytest.raises(ValueError, match=r"window_tokens is 64.*--window-tokens"):
        parse_options({"window_tokens": 64}, load_method("SINK_WINDOW"), 1)


def _step(new: dict[str, Any] | None = None, finished: tuple[str, ...] = ()) -> Any:
    requests = [
        SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=extra))
        for name, extra in (new or {}).items()
    ]
    return SimpleNamespace(finished_req_ids=set(finished), scheduled_new_reqs=requests)


def test_the_book_follows_requests_through_reordering_and_the_end() -> None:
    book = RequestBook()
    ids = ["a", "b", "c"]
    book.row_ids = lambda: ids
    book.update(_step({"a": None, "b": {"budget_tokens": 128}, "c": {"sparse": "off"}}))
    assert book.of_rows(3) == {1: RowOptions(budget_tokens=128), 2: RowOptions(is_dense=True)}
    ids[:] = ["c", "a", "b"]
    assert book.of_rows(1) == {0: RowOptions(is_dense=True)}
    book.update(_step(finished=("c",)))
    ids[:] = ["b", "a"]
    assert book.of_rows(2) == {0: RowOptions(budget_tokens=128)}
    book.update(_step({"b": None}, finished=("b",)))  # an id may come back as another request
    assert book.of_rows(2) == {}


def test_presets_of_the_server_are_known_to_front_end_and_worker() -> None:
    presets = {"deep": RowOptions(budget_tokens=2048)}
    assert parse_options({"sparse": "deep"}, TIDAL, 96, presets) == presets["deep"]
    with pytest.raises(ValueError, match="one of on, off, deep"):
        parse_options({"sparse": "fast"}, TIDAL, 96, presets)
    with pytest.raises(ValueError, match="give one of them"):
        parse_options({"sparse": "deep", "budget_tokens": 512}, TIDAL, 96, presets)
    book = RequestBook()
    book.presets = presets
    book.row_ids = lambda: ["a", "b"]
    book.update(_step({"a": {"sparse": "deep"}, "b": {"sparse": "on"}}))
    assert book.of_rows(2) == {0: presets["deep"], 1: RowOptions()}
