"""Calibrates MOA: from a model folder to what each KV head sees.

1. *Responses* of the dense model itself, to retrieval prompts and natural text, at three lengths.
2. *Influence* of every rule on every KV head (``influence``), each length and kind of prompt apart.
3. *Plans*: the least influence under the density budget (``assignment``); once more with as many
   heads that read everything, but those whose learned gates stay open (``gates``); and that with
   half as many, those to which everything is worth most when tried out (``trials``).
4. *Validation*: prompts that chose nothing, twice as long, with every plan's spans in prefill and
   answers, against dense. The plan of the least divergence is written.

Nothing is printed here and no file of the user's is written: the command does both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from attn_backends.checkpoint import fingerprint
from attn_backends.profile import Profile
from kvcache.spans import BETA_UNIT, Span
from vllm_ext.calibration.assignment import (
    Program,
    assign,
    density_of,
    group_size,
    least_cost,
    require_solver,
)
from vllm_ext.calibration.elastic_prompts import RESPONSE_TOKENS, Prompt, make_prompts
from vllm_ext.calibration.elastic_section import profile_of
from vllm_ext.calibration.ends import Reading, divergences, read
from vllm_ext.calibration.gates import learned_gates
from vllm_ext.calibration.influence import Influence
from vllm_ext.calibration.plans import Plan, both_kinds, halved, never_less, opened, paid
from vllm_ext.calibration.spanned import SpannedModel
from vllm_ext.calibration.state import SavedState
from vllm_ext.calibration.trials import (
    ReadingSizes,
    make_readings,
    needs_of_everything,
    trial_sizes,
)

# Spans in proportion to the position. Constants beside it (MoA's alphas) keep to a budget at the
# lengths that are measured, and starve longer prompts: at twice the length plans with them kept 26
# to 37% instead of 50, and lost what they were asked for (docs/measurements.md).
BETAS_64THS = (4, 8, 12, 16, 24, 32, 40, 48)
NARROW_RULE = 1  # what heads see whose gates are shut
LENGTH_SHARES = (4, 2, 1)  # of the longest prompt
VALIDATION_FACTOR = 2  # as long as the longest prompt
VALIDATION_SEED = 1_000_003
VALIDATIONS = 2  # prompts of each kind, with several ends each
ROOM_TOKENS = 64  # behind the longest prompts, for a question and its answer
TRIAL_SEED = 5
HALF_RULE = BETAS_64THS.index(BETA_UNIT // 2)
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
        measured = make_prompts(
            self._loaded().tokenizer,
            settings.seed,
            settings.corpus,
            settings.lengths_tokens(),
            settings.examples,
        )
        validated = self._validation()
        influence = self._influence(measured)
        plans = self._plans(influence)
        plans += self._gated(influence, plans[-1])
        plans += self._halved(influence, plans[-1])
        plans = self._validated(plans, validated)
        best = min(plans, key=lambda plan: plan.loss)
        for plan in plans:
            self._echo(plan.line("chosen" if plan is best else "plan"))
        shown = {
            "plans": [asdict(plan) for plan in plans],
            "curve": self._curve(influence),
            "spans": [self._rules[rule] for rule in best.rules],
        }
        longest = self._validated_tokens()
        return profile_of(settings, self._loaded(), best, plans, longest), shown

    def _loaded(self) -> SpannedModel:
        if self._model is None:
            self._model = SpannedModel(self._settings.model)
        return self._model

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
        costs = np.sum(list(influence.values()), axis=0)
        return [self._plan("least influence", influence, assign(self._program(costs)))]

    def _plan(self, aim: str, influence: dict[int, np.ndarray], rules: list[int]) -> Plan:
        return Plan(aim, rules, [paid(one, rules) for one in influence.values()])

    def _gated(self, influence: dict[int, np.ndarray], like: Plan) -> list[Plan]:
        """A plan whose full heads are those of the widest gates, as many as of another plan."""
        full = len(self._rules) - 1
        costs = np.sum(list(influence.values()), axis=0)
        if full not in like.rules:
            return []
        bound = opened(costs, self._gates(costs), like.rules.count(full))
        rules = assign(self._program(bound))
        return [self._plan("full heads by gates", influence, rules)]

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

    def _halved(self, influence: dict[int, np.ndarray], like: Plan) -> list[Plan]:
        """A plan with half as many full heads as another, the others wider for it."""
        name, full = like.named("halves"), len(self._rules) - 1
        if like.rules.count(full) < 2 * group_size(len(like.rules)):
            return []
        if self._state.recall(name) is None:
            settings, model = self._settings, self._loaded()
            sizes = trial_sizes(settings.context_tokens)
            found = needs_of_everything(
                model,
                [self._rules[rule] for rule in like.rules],
                self._rules[HALF_RULE],
                make_readings(model, settings.seed + TRIAL_SEED, settings.corpus, sizes),
                lambda done, total: self._progress("trying halves", done, total),
            )
            self._state.keep(name, [[head, need] for head, need in found.items()])
        needs = {int(head): need for head, need in self._state.recall(name)}
        program = self._program(next(iter(influence.values())))
        rules = halved(like.rules, needs, HALF_RULE, program)
        return [self._plan("half as many full heads, by trials", influence, rules)]

    def _program(self, costs: np.ndarray, density: float | None = None) -> Program:
        density = self._settings.density if density is None else density
        longest = self._settings.context_tokens
        densities = np.array([[density_of(rule, longest) for rule in self._rules]])
        return Program(costs, densities, density, group_size(len(costs)))

    def _curve(self, influence: dict[int, np.ndarray]) -> list[tuple[float, float]]:
        """Influence over all lengths by density: what another budget could give at best, with as
        many classes as heads.
        """
        costs = np.sum(list(influence.values()), axis=0)
        return [(share, round(least_cost(self._program(costs, share)), 4)) for share in CURVE]

    def _validation(self) -> list[Reading]:
        """Prompts that choose nothing but the plan."""
        settings, longest = self._settings, self._validated_tokens() - ROOM_TOKENS
        sizes = ReadingSizes(longest - 1, longest, filled=VALIDATIONS, hidden=0, texts=VALIDATIONS)
        return make_readings(
            self._loaded(), settings.seed + VALIDATION_SEED, settings.corpus, sizes
        )

    def _validated(self, plans: list[Plan], readings: list[Reading]) -> list[Plan]:
        """The plans with their divergences."""
        for number, reading in enumerate(readings):
            self._progress("validating", number, len(readings))
            self._validate(f"verdict {number}", reading, plans)
        self._progress("validating", len(readings), len(readings))
        return [self._with_verdicts(plan, readings) for plan in plans]

    def _validated_tokens(self) -> int:
        """Of the prompts that plans are validated on: twice the longest, if the model has room."""
        return min(VALIDATION_FACTOR * self._settings.context_tokens, self._loaded().max_tokens)

    def _validate(self, name: str, reading: Reading, plans: list[Plan]) -> None:
        """Each plan's divergence at the ends of a prompt, where it is not known yet."""
        missing = [plan for plan in plans if self._state.recall(plan.named(name)) is None]
        if not missing:
            return
        model = self._loaded()
        dense = read(model, reading, [self._rules[-1]] * len(missing[0].rules))
        for plan in missing:
            given = read(model, reading, [self._rules[rule] for rule in plan.rules])
            pairs = zip(dense, given, strict=True)
            agrees = [(one.argmax(-1) == two.argmax(-1)).float().mean() for one, two in pairs]
            kl = float(divergences(dense, given).mean())
            self._state.keep(plan.named(name), {"kl": kl, "agreement": float(np.mean(agrees))})
        reading.kept = []

    def _with_verdicts(self, plan: Plan, readings: list[Reading]) -> Plan:
        verdicts = [self._state.recall(plan.named(f"verdict {n}")) for n in range(len(readings))]

        def mean(kind: str, figure: str) -> float:
            both = zip(readings, verdicts, strict=True)
            return round(float(np.mean([v[figure] for r, v in both if r.kind == kind])), 5)

        return replace(
            plan,
            kl_text=mean("text", "kl"),
            kl_retrieval=mean("retrieval", "kl"),
            agreement_retrieval=mean("retrieval", "agreement"),
        )
