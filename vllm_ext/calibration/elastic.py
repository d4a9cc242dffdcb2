"""Calibrates MOA: from a model folder to what each KV head sees.

1. *Responses* of the dense model itself, to retrieval prompts and natural text, at three lengths.
2. *Influence* of every rule on every KV head (``influence``), each length and kind of prompt apart.
3. *Plans*: the least influence under the density budget (``assignment``), at the longest prompts
   and at all lengths together; and once more with as many heads that read everything, but those
   whose learned gates stay open (``gates``).
4. *Validation*: prompts that chose nothing, twice as long, with every plan's spans in prefill and
   response, against dense. The plan of the least divergence is written.

Nothing is printed here and no file of the user's is written: the command does both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from attn_backends.checkpoint import fingerprint, read_model_config
from attn_backends.methods.moa import METHOD as MOA
from attn_backends.methods.moa import HeadSpans
from attn_backends.profile import SCHEMA_VERSION, Profile
from kvcache.spans import BETA_UNIT, Span
from vllm_ext.calibration.assignment import (
    Program,
    assign,
    density_of,
    group_size,
    least_cost,
    mean_density,
    require_solver,
)
from vllm_ext.calibration.elastic_prompts import RESPONSE_TOKENS, Prompt, make_prompts
from vllm_ext.calibration.gates import learned_gates
from vllm_ext.calibration.influence import Influence
from vllm_ext.calibration.plans import Plan, both_kinds, never_less, opened, paid
from vllm_ext.calibration.spanned import SpannedModel
from vllm_ext.calibration.state import SavedState

# Spans in proportion to the position. Constants beside it (MoA's alphas) keep to a budget at the
# lengths that are measured, and starve longer prompts: at twice the length plans with them kept 26
# to 37% instead of 50, and lost what they were asked for (docs/measurements.md).
BETAS_64THS = (4, 8, 12, 16, 24, 32, 40, 48)
NARROW_RULE = 1  # what heads see whose gates are shut
LENGTH_SHARES = (4, 2, 1)  # of the longest prompt
VALIDATION_FACTOR = 2  # as long as the longest prompt
VALIDATION_SEED = 1_000_003
VALIDATIONS = 2  # prompts of each kind
CURVE = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # densities of the report's curve

Echo = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # what is done, how many are, of how many


@dataclass(frozen=True)
class ElasticSettings:
    """What is calibrated, and on which prompts; the command's flags of these names.

    Attributes:
        model: folder of the checkpoint.
        density: share of the longest prompt's tokens that the heads keep on average, at most.
        context_tokens: of the longest prompt.
        examples: prompts of each kind and length.
        sink_tokens: first tokens that every head sees.
        floor_tokens: the least span.
        corpus: text file; None is Python's library.
        seed: of the choice of prompts.
    """

    model: Path
    density: float = 0.5
    context_tokens: int = 4096
    examples: int = 3
    sink_tokens: int = 64
    floor_tokens: int = 128
    corpus: Path | None = None
    seed: int = 0

    def key(self) -> dict[str, str]:
        """What measurements depend on, for ``SavedState``; the density only chooses."""
        settings = {name: str(value) for name, value in vars(self).items() if name != "density"}
        rules = " ".join(map(str, self.rules()))
        return settings | {"fingerprint": fingerprint(self.model), "rules": rules}

    def rules(self) -> list[Span]:
        """The spans that heads may get; the last hides nothing."""
        betas_64ths = (*BETAS_64THS, BETA_UNIT)
        return [Span(self.sink_tokens, self.floor_tokens, 0, beta) for beta in betas_64ths]

    def lengths_tokens(self) -> list[int]:
        """Of the prompts, ascending."""
        return [self.context_tokens // share for share in LENGTH_SHARES]


class Calibration:
    """A model being calibrated.

    Args:
        settings: what for.
        state: results that are known already; the others are added.
        echo: takes lines for people.
        progress: told of every step.
    """

    def __init__(
        self, settings: ElasticSettings, state: SavedState, echo: Echo, progress: Progress
    ) -> None:
        self._settings, self._state = settings, state
        self._echo, self._progress = echo, progress
        self._rules = settings.rules()
        self._model: SpannedModel | None = None

    def run(self) -> tuple[Profile, dict[str, Any]]:
        """All stages.

        Returns:
            A profile with MOA's section, and what the report shows.

        Raises:
            UserError: no plan keeps to the density, scipy is missing, a model of an unknown style,
                or too short a corpus.
        """
        require_solver()
        settings = self._settings
        # All at once: a corpus that is too short must not be found out after half an hour.
        measured = self._prompts(settings.seed, settings.lengths_tokens(), settings.examples)
        validated = self._prompts(
            settings.seed + VALIDATION_SEED, [self._validated_tokens()], VALIDATIONS
        )
        influence = self._influence(measured)
        plans = self._plans(influence)
        plans += self._gated(influence, plans[-1])
        plans = self._validated(plans, validated)
        best = min(plans, key=lambda plan: plan.loss)
        for plan in plans:
            self._echo(plan.line("chosen" if plan is best else "plan"))
        shown = {
            "plans": [asdict(plan) for plan in plans],
            "curve": self._curve(influence),
            "spans": [self._rules[rule] for rule in best.rules],
        }
        return self._profile(best, plans), shown

    def _loaded(self) -> SpannedModel:
        if self._model is None:
            self._model = SpannedModel(self._settings.model)
        return self._model

    def _prompts(self, seed: int, lengths_tokens: Sequence[int], number: int) -> list[Prompt]:
        """As many of each kind at each length."""
        tokenizer, corpus = self._loaded().tokenizer, self._settings.corpus
        return make_prompts(tokenizer, seed, corpus, lengths_tokens, number)

    def _influence(self, prompts: list[Prompt]) -> dict[int, np.ndarray]:
        """``[heads, rules]`` by length; both kinds of prompt count the same."""
        found = []
        for number, prompt in enumerate(prompts):
            self._progress("measuring influence", number, len(prompts))
            name = f"influence {number}"
            if self._state.recall(name) is None:
                self._state.keep(name, self._measure(prompt))
            found.append(self._state.recall(name))
        self._progress("measuring influence", len(prompts), len(prompts))
        by_length = {}
        for length in self._settings.lengths_tokens():
            costs = both_kinds([one for one in found if one["length_tokens"] == length])
            kept = np.array([density_of(rule, length) for rule in self._rules])
            by_length[length] = never_less(costs, kept)
        return by_length

    def _measure(self, prompt: Prompt) -> dict[str, Any]:
        model = self._loaded()
        response, _ = model.respond(prompt.ids, RESPONSE_TOKENS[prompt.kind])
        influence = Influence(self._rules, model.num_layers, model.num_kv_heads)
        with model.attending(influence.attend):
            influence.measure(model.model, prompt.ids + response, len(response))
        found = influence.change.abs().flatten(0, 1)
        costs = [[float(f"{cost:.4g}") for cost in head] for head in found]
        return {"kind": prompt.kind, "length_tokens": prompt.length_tokens, "costs": costs}

    def _plans(self, influence: dict[int, np.ndarray]) -> list[Plan]:
        longest = self._settings.context_tokens
        aims = {str(longest): [influence[longest]], "all lengths": list(influence.values())}
        plans: list[Plan] = []
        for number, (aim, costs) in enumerate(aims.items()):
            self._progress("planning", number, len(aims))
            rules = assign(self._program(np.sum(costs, axis=0), self._settings.density))
            if all(rules != plan.rules for plan in plans):
                plans.append(Plan(aim, rules, [paid(one, rules) for one in influence.values()]))
        self._progress("planning", len(aims), len(aims))
        return plans

    def _gated(self, influence: dict[int, np.ndarray], like: Plan) -> list[Plan]:
        """A plan whose full heads are those of the widest gates, as many as of another plan."""
        full = len(self._rules) - 1
        costs = np.sum(list(influence.values()), axis=0)
        if full not in like.rules:
            return []
        bound = opened(costs, self._gates(costs), like.rules.count(full))
        rules = assign(self._program(bound, self._settings.density))
        spent = [paid(one, rules) for one in influence.values()]
        return [Plan("all lengths, full heads by gates", rules, spent)]

    def _gates(self, costs: np.ndarray) -> list[float]:
        name = f"gates {self._settings.density}"
        if self._state.recall(name) is None:
            narrow = self._rules[NARROW_RULE]
            found = learned_gates(
                self._loaded(),
                narrow,
                costs[:, NARROW_RULE],
                self._settings,
                lambda done, total: self._progress("learning gates", done, total),
            )
            self._state.keep(name, found)
        known: list[float] = self._state.recall(name)
        return known

    def _program(self, costs: np.ndarray, density: float) -> Program:
        longest = self._settings.context_tokens
        densities = np.array([[density_of(rule, longest) for rule in self._rules]])
        return Program(costs, densities, density, group_size(len(costs)))

    def _curve(self, influence: dict[int, np.ndarray]) -> list[tuple[float, float]]:
        """Influence over all lengths by density: what another budget could give at best, with as
        many classes as heads.
        """
        costs = np.sum(list(influence.values()), axis=0)
        return [(share, round(least_cost(self._program(costs, share)), 4)) for share in CURVE]

    def _validated(self, plans: list[Plan], prompts: list[Prompt]) -> list[Plan]:
        """The plans with their divergences."""
        for number, prompt in enumerate(prompts):
            self._progress("validating", number, len(prompts))
            self._validate(f"validation {number}", prompt, plans)
        self._progress("validating", len(prompts), len(prompts))
        return [self._with_verdicts(plan, prompts) for plan in plans]

    def _validated_tokens(self) -> int:
        """Of the prompts that plans are validated on: twice the longest, if the model has room."""
        return min(VALIDATION_FACTOR * self._settings.context_tokens, self._loaded().max_tokens)

    def _validate(self, name: str, prompt: Prompt, plans: list[Plan]) -> None:
        """Each plan's divergence on a prompt, where it is not known yet."""
        missing = [plan for plan in plans if self._state.recall(plan.named(name)) is None]
        if not missing:
            return
        model = self._loaded()
        response, dense = model.respond(prompt.ids, RESPONSE_TOKENS[prompt.kind])
        for plan in missing:
            spans = [self._rules[rule] for rule in plan.rules]
            given = model.logprobs(prompt.ids + response, len(response), spans)
            kl = (dense.exp() * (dense - given)).sum(-1).mean()
            agrees = (dense.argmax(-1) == given.argmax(-1)).float().mean()
            verdict = {"kl": float(kl), "agreement": float(agrees)}
            self._state.keep(plan.named(name), verdict)

    def _with_verdicts(self, plan: Plan, prompts: list[Prompt]) -> Plan:
        verdicts = [self._state.recall(plan.named(f"validation {n}")) for n in range(len(prompts))]

        def mean(kind: str, figure: str) -> float:
            both = zip(prompts, verdicts, strict=True)
            return round(float(np.mean([v[figure] for p, v in both if p.kind == kind])), 5)

        return replace(
            plan,
            kl_text=mean("text", "kl"),
            kl_retrieval=mean("retrieval", "kl"),
            agreement_retrieval=mean("retrieval", "agreement"),
        )

    def _profile(self, best: Plan, plans: list[Plan]) -> Profile:
        settings, model = self._settings, self._loaded()
        used = sorted({*best.rules})
        spans = [self._rules[rule] for rule in used]
        heads = iter(best.rules)
        section = HeadSpans(
            sink_tokens=settings.sink_tokens,
            floor_tokens=settings.floor_tokens,
            classes=[[span.alpha_tokens, span.beta_64ths] for span in spans],
            class_of_head=[
                [used.index(rule) for rule in islice(heads, model.num_kv_heads)]
                for _ in range(model.num_layers)
            ],
        )
        served = [self._rules[rule] for rule in best.rules]
        lengths = [*settings.lengths_tokens(), self._validated_tokens()]
        config = read_model_config(settings.model)
        return Profile(
            schema_version=SCHEMA_VERSION,
            fingerprint=fingerprint(settings.model),
            model=settings.model.name,
            num_layers=model.num_layers,
            num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            calibration={
                MOA.name: {
                    **{name: _plain(value) for name, value in vars(settings).items()},
                    "validated_tokens": self._validated_tokens(),
                    "aim": best.aim,
                    "density_at": {n: round(mean_density(served, n), 4) for n in lengths},
                    "kl_text": best.kl_text,
                    "kl_retrieval": best.kl_retrieval,
                    "plans": [
                        {key: value for key, value in asdict(plan).items() if key != "rules"}
                        for plan in plans
                    ],
                }
            },
        ).with_section(MOA.name, section)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name  # no folder of the user's
    return value if isinstance(value, int | float | None) else str(value)
