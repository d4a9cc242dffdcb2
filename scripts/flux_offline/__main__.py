"""Does a router per request beat the best layers for all requests? FLUX's question, offline.

``python -m scripts.flux_offline MODEL --output FILE.npz --device cuda`` measures prompts under many
routes, fits routers on one set of them, and prints how they and their rivals do on another set at
equal shares of full layers. FILE.npz has whatever a later fit needs.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvcache.spans import Span
from scripts.flux_offline.routing_compare import SHARES, Comparison
from vllm_ext.calibration.data import corpora
from vllm_ext.calibration.routed import RoutedModel
from vllm_ext.calibration.routed_prompts import make_prompts
from vllm_ext.calibration.routing_fit import greedy_order, prefix_masks
from vllm_ext.calibration.routing_study import Study
from vllm_ext.cli.flux_prompts import held_out

STARTED = time.monotonic()
FIT_LENGTHS_TOKENS = (1024, 2048, 4096)
TEST_LENGTHS_TOKENS = (1024, 2048, 4096, 7680)
NUM_RANDOM = 24
COMBINATIONS = np.array([[number >> place & 1 for place in range(3)] for number in range(8)], bool)


class Experiment:
    """All of it.

    Args:
        settings: the command's.
    """

    def __init__(self, settings: argparse.Namespace) -> None:
        self._settings = settings
        self._started = settings.started
        self._arrays: dict[str, np.ndarray] = {"settings": np.array(str(vars(settings)))}
        span = Span(settings.sinks, settings.window)
        self._model = RoutedModel.load(settings.model, span, settings.device)
        self._layers = self._model.num_layers
        self._arrays["num_kv_heads"] = np.array(self._model.num_kv_heads)
        self._parts: dict[str, slice] = {}
        self._masks = np.zeros((0, self._layers), bool)
        self._tables: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self._studies: dict[str, Study] = {}

    def run(self) -> None:
        """Measures, fits, compares; saves after every stage."""
        self._echo("model loaded")
        self._read_prompts()
        eye = np.eye(self._layers, dtype=bool)
        self._add({"none": np.zeros_like(eye[:1]), "alone_sparse": ~eye, "alone_full": eye})
        forward = self._order(is_forward=True)
        orders = {"forward": forward}
        if self._has_time(0.55):
            orders["backward"] = self._order(is_forward=False)
        else:
            self._echo("no backward order: --seconds are more than half over")
        size = self._layers // 5
        groups = [forward[size * place : size * (place + 1)] for place in range(5)]
        self._arrays["groups"] = np.array(groups)
        combined = np.zeros((len(COMBINATIONS), self._layers), bool)
        combined[:, groups[0]] = True
        for place in range(3):
            combined[:, groups[1 + place]] = COMBINATIONS[:, place : place + 1]
        self._add(
            {name: prefix_masks(order) for name, order in orders.items()} | {"combined": combined},
            is_generated=True,
        )
        self._measure_lazy()
        for text in Comparison(self._arrays).lines():
            print(text, flush=True)
        self._echo("compared")
        if self._has_time(0.8):
            chance = np.random.default_rng(5)
            shares = chance.uniform(0.1, 0.8, (NUM_RANDOM, 1))
            self._add({"random": chance.random((NUM_RANDOM, self._layers)) < shares})
        else:
            self._echo("no random routes: --seconds are nearly over")
        self._echo("done")

    def _read_prompts(self) -> None:
        from transformers import AutoTokenizer

        settings = self._settings
        tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
        texts = [tokenizer(text)["input_ids"] for text in corpora(None)]
        fit_lengths = [n for n in FIT_LENGTHS_TOKENS if n <= settings.longest]
        test_lengths = [n for n in TEST_LENGTHS_TOKENS if n <= settings.longest]
        number = -(-settings.prompts // 3)
        sets = {
            "fit": make_prompts(tokenizer, random.Random(11), texts, fit_lengths, number),
            "test": held_out(tokenizer, -(-settings.held_out // 3), test_lengths),
        }
        for name, prompts in sets.items():
            study = Study(self._model, tokenizer, prompts, settings.answer_tokens)
            self._studies[name], self._tables[name] = study, []
            self._arrays |= {f"{name}_{key}": value for key, value in study.raw().items()}
            mean = np.mean([len(prompt.ids) for prompt in prompts])
            self._echo(f"{name}: {len(prompts)} prompts of {mean:.0f} tokens read and answered")

    def _order(self, is_forward: bool) -> list[int]:
        study, settings = self._studies["fit"], self._settings

        def damage(masks: np.ndarray) -> np.ndarray:
            kl, _ = study.compare(masks, settings.order_tokens, settings.order_batches)
            return np.asarray(np.nanmean(kl, 2).mean(0))

        order = greedy_order(damage, self._layers, is_forward)
        name = "forward" if is_forward else "backward"
        self._arrays[f"order_{name}"] = np.array(order)
        self._echo(f"order, {name}: {order}")
        return order

    def _add(self, masks: dict[str, np.ndarray], is_generated: bool = False) -> None:
        """Measures all prompts under more masks."""
        for name, part in masks.items():
            self._parts[name] = slice(len(self._masks), len(self._masks) + len(part))
            self._masks = np.concatenate([self._masks, part])
            self._arrays[f"columns_{name}"] = np.array(
                [self._parts[name].start, self._parts[name].stop]
            )
        added = np.concatenate(list(masks.values()))
        for name, study in self._studies.items():
            kl, agrees = study.compare(added)
            hits = np.full(kl.shape[:2], np.nan, np.float32)
            if is_generated:
                hits = study.hits(added)
            self._tables[name].append((kl.astype(np.float16), agrees, hits))
            tables = zip(*self._tables[name], strict=True)
            for key, table in zip(("kl", "agrees", "hits"), tables, strict=True):
                self._arrays[f"{name}_{key}"] = np.concatenate(table, 1)
        self._arrays["masks"] = self._masks
        self._save()
        self._echo(f"measured: {', '.join(masks)}")

    def _measure_lazy(self) -> None:
        """SimLayerKV's test: a layer whose last query looks into the gap is full."""
        gap = self._arrays["test_gap_last"].astype(np.float64).mean(2)
        masks = np.stack([gap > np.quantile(gap, 1 - share) for share in SHARES], 1)
        study = self._studies["test"]
        kl, agrees = study.compare(masks)
        self._arrays |= {"lazy_masks": masks, "lazy_kl": kl.astype(np.float16)}
        self._arrays |= {"lazy_agrees": agrees, "lazy_hits": study.hits(masks)}
        self._save()

    def _has_time(self, part: float) -> bool:
        return self._spent_s() < part * float(self._settings.seconds)

    def _spent_s(self) -> float:
        return time.monotonic() - float(self._started)

    def _save(self) -> None:
        arrays: dict[str, Any] = dict(self._arrays)
        np.savez_compressed(self._settings.output, **arrays)

    def _echo(self, text: str) -> None:
        print(f"[{self._spent_s():6.1f} s] {text}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=120, help="that are fitted")
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--output", type=Path, required=True, help=".npz")
    parser.add_argument("--device", default="cpu", choices=["cuda", "cpu"])
    parser.add_argument("--sinks", type=int, default=64, help="tokens")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--longest", type=int, default=7680, help="tokens of a prompt")
    parser.add_argument("--answer-tokens", type=int, default=20, help="after the first")
    parser.add_argument("--order-tokens", type=int, default=12, help="of answers that order layers")
    parser.add_argument("--order-batches", type=int, help="of prompts that order layers")
    parser.add_argument("--seconds", type=float, default=140, help="what is optional ends before")
    parser.add_argument("--again", action="store_true", help="only compare what the output has")
    settings = parser.parse_args()
    if settings.again:
        print("\n".join(Comparison(dict(np.load(settings.output))).lines()))
        return
    settings.started = STARTED
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    Experiment(settings).run()


if __name__ == "__main__":
    main()
