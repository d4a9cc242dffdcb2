"""Calibrates FLUX: from a model folder to which layers read everything, always or by request.

1. *Order* of the layers, most needed first: the dense model answers prompts, and from all layers
   sparse the one turns full whose answers come closest to that.
2. *Tables* of prompts: their evidence, and what each number of full layers does to the answer; of
   those that are fitted, and of others.
3. *Routers*: the order is split into always full, routed and always window; routers are fitted on
   the first table (``routers``), to a mean share of full layers.
4. *Verdict* by the second table: what the router costs (``Measured.costs_of``) against the best
   layers for all requests at the same share, and a training-free test beside them.

Nothing is printed here and no file of the user's is written: the command does both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attn_backends.checkpoint import fingerprint, read_model_config
from kvcache.spans import Span
from vllm_ext.calibration.data import corpora, require_long_enough
from vllm_ext.calibration.flux_tables import Table, TableMaker
from vllm_ext.calibration.layer_splits import unit_layers
from vllm_ext.calibration.routed import RoutedModel
from vllm_ext.calibration.routed_prompts import RoutedPrompt, make_prompts
from vllm_ext.calibration.routers import Fit, Measured, RouterFits
from vllm_ext.calibration.routing_fit import greedy_order, prefix_masks
from vllm_ext.calibration.routing_outcomes import Outcome, Variants
from vllm_ext.calibration.routing_study import Study
from vllm_ext.calibration.state import SavedState

LEAST_TOKENS = 960  # of the shortest prompts
HELD_OUT_FACTOR = 2  # as long as the longest prompt that is fitted
ROOM_TOKENS = 512  # of the model's context that prompts leave, for template and answer
ANSWER_TOKENS = 20  # after the first
ORDER_TOKENS = 12  # of answers that order layers
LAZY_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)

Echo = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # what is done, how many are, of how many
HeldOut = Callable[[Any, int, Sequence[int]], list[RoutedPrompt]]


@dataclass(frozen=True)
class FluxSettings:
    """What is calibrated, and on which prompts; the command's flags of these names.

    Attributes:
        model: folder of the checkpoint.
        share: of full layers, mean over requests.
        context_tokens: of the longest prompt that is fitted; the others are a half, a quarter...
        prompts: that are fitted, a third of each kind.
        order_prompts: of these, that order the layers.
        held_out: others, that judge.
        sink_tokens: first tokens that sparse layers see.
        window_tokens: last tokens that they see.
        corpus: text file; None is Python's library.
        seed: of the choice of prompts.
    """

    model: Path
    share: float = 0.46
    context_tokens: int = 4096
    prompts: int = 81
    order_prompts: int = 15
    held_out: int = 36
    sink_tokens: int = 64
    window_tokens: int = 512
    corpus: Path | None = None
    seed: int = 0

    def key(self) -> dict[str, str]:
        """What measurements depend on, for ``SavedState``: not the share, which only chooses, nor
        the machine.
        """
        chosen = ("model", "share")
        settings = {name: str(value) for name, value in vars(self).items() if name not in chosen}
        return settings | {"fingerprint": fingerprint(self.model)}

    def lengths_tokens(self) -> list[int]:
        """Of the prompts that are fitted, ascending."""
        halved = (self.context_tokens >> times for times in range(3, -1, -1))
        return [n for n in halved if n >= min(LEAST_TOKENS, self.context_tokens)]

    def held_out_lengths_tokens(self, max_tokens: int) -> list[int]:
        """Of the others: twice as long, too, if the model has room."""
        longest = min(HELD_OUT_FACTOR * self.context_tokens, max_tokens - ROOM_TOKENS)
        return [*self.lengths_tokens(), *[n for n in (longest,) if n > self.context_tokens]]


@dataclass(frozen=True)
class Found:
    """What a calibration finds.

    Attributes:
        order: layers, the most needed first.
        fits: of routers, the best kind first; empty where no split is possible.
        fitted: prompts that were fitted.
        held_out: others.
        lazy: what the lazy test does to those, at ``LAZY_SHARES``.
    """

    order: list[int]
    fits: list[Fit]
    fitted: Measured
    held_out: Measured
    lazy: Variants

    @cached_property
    def depths(self) -> np.ndarray:
        """``[prompts]``, where the best router sends the held-out prompts."""
        return self.fits[0].router(len(self.order)).depths(self.held_out)

    @cached_property
    def routed(self) -> Outcome:
        """What the best router does to them."""
        return self.held_out.nested(self.fits[0].split.numbers()).pick(self.depths)

    @cached_property
    def static(self) -> Outcome:
        """What the best layers for all requests do to them, with as many full layers on average."""
        return self.held_out.variants.between(float(self.routed.share.mean()))


def device() -> str:
    """Where models are calibrated."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Calibration:
    """A model being calibrated.

    Args:
        settings: what for.
        state: results that are known already; the others are added.
        held_out: makes the prompts that judge, from the tokenizer, a number of each kind and
            lengths.
        echo: takes lines for people.
        progress: told of every step.
    """

    def __init__(
        self,
        settings: FluxSettings,
        state: SavedState,
        held_out: HeldOut,
        echo: Echo,
        progress: Progress,
    ) -> None:
        self._settings, self._state, self._held_out = settings, state, held_out
        self._echo, self._progress = echo, progress
        config = read_model_config(settings.model)
        self.num_layers: int = config["num_hidden_layers"]
        self._max_tokens: int = config["max_position_embeddings"]
        self._order_study: Study | None = None

    def run(self) -> Found:
        """All stages.

        Raises:
            UserError: too short a corpus, or a model of an unknown style.
        """
        settings = self._settings
        # All at once: a corpus that is too short must not be found out after half an hour.
        fitted, others = self._prompts()
        order = self._order(fitted[: settings.order_prompts])
        self._echo(f"layers, most needed first: {', '.join(map(str, order))}")
        prefixes = prefix_masks(order)
        units = sorted({*range(0, self.num_layers + 1, unit_layers(self.num_layers))})
        table = self._table("fitted", fitted, prefixes[units])
        # What share of all layers of all prompts looks into the gap as much as that.
        bars = np.quantile(table.gap_last, [1 - share for share in LAZY_SHARES])
        judged = self._table("held out", others, prefixes, bars)
        everything = self.num_layers + 1
        measured = table.measured(units)
        self._echo("fitting routers")
        fits = RouterFits(measured, settings.share, settings.seed).best()
        return Found(
            order,
            fits,
            measured,
            judged.measured(range(everything)),
            judged.variants.part(slice(everything, None)),
        )

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._settings.model)

    @cached_property
    def _model(self) -> RoutedModel:
        settings = self._settings
        span = Span(settings.sink_tokens, settings.window_tokens)
        return RoutedModel.load(settings.model, span, device())

    def _prompts(self) -> tuple[list[RoutedPrompt], list[RoutedPrompt]]:
        """Those that are fitted, and the others; as many of each kind."""
        settings, tokenizer = self._settings, self._tokenizer
        lengths = settings.lengths_tokens()
        texts = [tokenizer(text)["input_ids"] for text in corpora(settings.corpus)]
        require_long_enough(texts, settings.corpus, lengths[-1])
        source = random.Random(settings.seed)
        fitted = make_prompts(tokenizer, source, texts, lengths, -(-settings.prompts // 3))
        others = self._held_out(
            tokenizer,
            -(-settings.held_out // 3),
            settings.held_out_lengths_tokens(self._max_tokens),
        )
        return fitted, others

    def _order(self, prompts: list[RoutedPrompt]) -> list[int]:
        """Greedy, by the mean divergence of the first answer tokens."""
        total = self.num_layers - 1
        steps = iter(range(total))

        def damage(masks: np.ndarray) -> np.ndarray:
            step = next(steps)
            self._progress("ordering layers", step, total)
            name = f"order {step}"
            if self._state.recall(name) is None:
                kl, _ = self._studied(prompts).compare(masks, ORDER_TOKENS)
                self._state.keep(name, np.nanmean(kl, 2).mean(0).round(7).tolist())
            return np.array(self._state.recall(name))

        order = greedy_order(damage, self.num_layers, is_forward=True)
        self._progress("ordering layers", total, total)
        self._order_study = None  # its prompts' keys and values
        return order

    def _studied(self, prompts: list[RoutedPrompt]) -> Study:
        if self._order_study is None:
            self._order_study = Study(self._model, self._tokenizer, prompts, ORDER_TOKENS)
        return self._order_study

    def _table(
        self,
        name: str,
        prompts: list[RoutedPrompt],
        masks: np.ndarray,
        bars: np.ndarray | None = None,
    ) -> Table:
        maker = TableMaker(lambda: self._model, self._tokenizer, ANSWER_TOKENS, device())
        left = sorted(prompts, key=lambda prompt: len(prompt.ids))
        parts = []
        while left:
            done = len(prompts) - len(left)
            self._progress(f"measuring prompts, {name}", done, len(prompts))
            known = f"{name} from {done}"
            if self._state.recall(known) is None:
                self._state.keep(known, maker.measure(maker.next_stack(left), masks, bars))
            parts.append(self._state.recall(known))
            left = left[len(parts[-1]["kind"]) :]
        self._progress(f"measuring prompts, {name}", len(prompts), len(prompts))
        return Table.joined(parts, masks, bars)
