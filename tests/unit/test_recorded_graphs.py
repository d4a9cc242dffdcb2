"""Graphs that are recorded refuse what a device cannot capture, and replay on what is there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.e2e.recorded_graphs import RecordedGraph, _graph

X = torch.tensor([3.0, 0.0, 1.0])
COUNTS = torch.tensor([1, 2, 0])


@pytest.mark.parametrize(
    "read",
    [
        lambda: X.sum().item(),
        lambda: int(COUNTS[1]),
        lambda: bool(X[0] > 1),
        lambda: X.tolist(),
        lambda: X.numpy(),
        lambda: X[: COUNTS[1]],
        lambda: X[X > 0],
        lambda: X.masked_select(X > 0),
        lambda: torch.where(X > 0),
        lambda: X.unique(),
        lambda: torch.repeat_interleave(X, COUNTS),
        lambda: torch.equal(X, X),
        lambda: torch.allclose(X, X),
        lambda: torch.tensor([1, 2]),
    ],
)
def test_what_waits_for_the_device_is_an_error(read: Callable[[], object]) -> None:
    graph = RecordedGraph()
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="while a graph is captured"),
        _graph(graph),
    ):
        read()


@torch.inference_mode()
def test_a_replay_computes_from_what_is_there() -> None:
    given, weight, out = torch.ones(4), torch.eye(4), torch.zeros(4)
    graph = RecordedGraph()
    with _graph(graph):
        hidden = torch.nn.functional.linear(given, weight).reshape(2, 2)
        out.copy_(hidden.softmax(-1).flatten() + given[torch.arange(4)])
    for value in (2.0, 5.0):
        given.fill_(value)
        graph.replay()
        torch.testing.assert_close(out, torch.full((4,), value + 0.5))


@torch.inference_mode()
def test_what_a_graph_allocated_is_gone_when_it_is_replayed() -> None:
    """What Python kept of a capture."""
    out, graph = torch.zeros(2), RecordedGraph()
    with _graph(graph):
        kept = torch.ones(2)
    later = RecordedGraph()
    with _graph(later):
        out.copy_(kept)
    graph.replay()
    later.replay()
    assert out.tolist() == [1, 1], "the graph that made it makes it again"
    graph._calls.clear()
    graph.replay()
    later.replay()
    assert out.isnan().all()
