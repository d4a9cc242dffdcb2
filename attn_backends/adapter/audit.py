"""Shadow audit: in some decode steps one row is computed densely as well, and compared.

In an audited step one of its rows, another each time, is given a budget for everything and
the pass runs twice: with that row dense, then as served. The real pass comes last, so that the
keys and values of the step's tokens, which both write, are its own in the end: nothing that a
request gets depends on the audit. What is measured is the divergence of one step, on the KV
cache that earlier sparse steps left. One row and not all: an audited step then takes up to twice
its time, where a whole dense pass over a full batch of long contexts takes several times that.

Steps with prefill rows are not audited: the share counts decode-only steps.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import torch
from vllm.forward_context import get_forward_context

from attn_backends.adapter.counters import AuditFigures
from attn_backends.adapter.metadata import ExtMetadata
from attn_backends.plan import Anchor, Reuse, reading_everything


class AuditingRunner:
    """Put before a V1 model runner of vLLM in the bases, whose ``_model_forward`` is made to be
    overridden; see ``with_audit``.
    """

    audit_share: float
    audit_figures: AuditFigures
    _audit_draw: random.Random
    _audit_due = 0.0
    _audit_at = 0.5
    _audited_steps = 0

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        context = get_forward_context()
        if not self._is_due(context.attn_metadata):
            return stock._model_forward(*args, **kwargs)
        served = context.attn_metadata
        first = next(iter(served.values()))
        rows, num_tokens = first.plan.narrowed_rows, first.batch.num_tokens
        row = rows[self._audited_steps % len(rows)]
        self._audited_steps += 1
        context.attn_metadata = {name: _dense(metadata, row) for name, metadata in served.items()}
        try:
            dense = stock._model_forward(*args, **kwargs)[:num_tokens].clone()
        finally:
            context.attn_metadata = served
        hidden = stock._model_forward(*args, **kwargs)
        model: Any = self.model  # type: ignore[attr-defined]
        # Of all rows, since a model may wrap the logits and know which row is whose (LoRA does);
        # the weights are read once either way.
        dense_logits = model.compute_logits(dense)[row : row + 1]
        served_logits = model.compute_logits(hidden[:num_tokens])[row : row + 1]
        self.audit_figures.add(
            *_divergence(dense_logits, served_logits),
            kv_bytes_saved=sum(_saved_bytes(served, name, row) for name in served),
        )
        return hidden

    def _is_due(self, served: Any) -> bool:
        if not isinstance(served, dict) or not served:
            return False
        first = next(iter(served.values()))
        if not isinstance(first, ExtMetadata):
            return False
        if first.batch.prefill is not None or not first.plan.narrowed_rows:
            return False
        return self._is_drawn()

    def _is_drawn(self) -> bool:
        """One step, drawn, of as many as the share allows one in: what else happens in every
        n-th step must not always be met.
        """
        self._audit_due += self.audit_share
        if self._audit_due < self._audit_at:
            return False
        self._audit_at = math.floor(self._audit_at) + 1 + self._audit_draw.random()
        return True


def with_audit(runner: Any, share: float, method: str) -> None:
    """Makes a runner audit a share of its decode steps.

    The worker constructs its runner itself and offers no other place: the instance becomes one
    of a subclass, made of ``AuditingRunner`` and the class it had.
    """
    stock: Any = type(runner)
    runner.__class__ = type(f"Auditing{stock.__name__}", (AuditingRunner, stock), {})
    runner.audit_share = share
    runner._audit_draw = random.Random(0)
    runner.audit_figures = AuditFigures(method)


def _dense(metadata: ExtMetadata, row: int) -> ExtMetadata:
    """The step with a budget for everything in one row.

    Dropped layers stay so, and those with a window, which may have lost what is outside it: the
    audit does not see what those cost.
    """
    layers = {name: reading_everything(plan, row) for name, plan in metadata.layers.items()}
    return replace(metadata, layers=layers)


def _divergence(dense: torch.Tensor, served: torch.Tensor) -> tuple[list[float], list[bool]]:
    """KL divergence (nats) of the served distributions from the dense ones, and whether the
    most likely tokens agree, by row; logits ``[num_rows, vocabulary]``.
    """
    expected, got = dense.float().log_softmax(-1), served.float().log_softmax(-1)
    divergence = (expected.exp() * (expected - got)).sum(-1)
    return divergence.tolist(), (expected.argmax(-1) == got.argmax(-1)).tolist()


def _chooses(way: Anchor, row: int) -> bool:
    """Whether the row chooses anew in this step."""
    if way.kept is None:
        return True
    return way.kept.due is not None and bool((way.kept.due == row).any())


def _saved_bytes(served: dict[str, ExtMetadata], layer_name: str, row: int) -> int:
    """Bytes of a row's keys and values that a layer did not read; negative where it read some
    of them more than once, and more than dense in all.

    The counts are the last anchor's: budgets are the same for all anchors of a step. A layer
    that chooses for itself reads all keys, once per selection of a KV head, and, of what it
    chose, keys and values again.
    """
    metadata = served[layer_name]
    plan = metadata.layers.get(layer_name)
    if plan is None or metadata.batch.decode is None:
        return 0
    way = plan.decode
    if not isinstance(way, Anchor | Reuse) or (isinstance(way, Anchor) and way.attends_everything):
        return 0
    layer = get_forward_context().no_compile_layers[layer_name]
    num_kv_heads, block_size, double_head = layer.kv_cache.shape[1:]
    seq_len = int(metadata.batch.decode.seq_lens[row])
    num_blocks = num_kv_heads * -(-seq_len // block_size)  # of all heads
    half_blocks = 2 * (num_blocks - int(way.selection.counts[row].sum()))  # keys, or values
    if isinstance(way, Anchor) and _chooses(way, row):
        half_blocks -= num_blocks
    return int(half_blocks * block_size * double_head // 2 * layer.kv_cache.element_size())
