"""Calibrates the methods with anchors: the stages of ``search``, from a model folder to a profile.

Nothing is printed here and no file of the user's is written: the command does both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attn_backends.budget_config import BudgetConfig
from attn_backends.checkpoint import fingerprint, read_model_config
from attn_backends.findings import Findings
from attn_backends.methods.sink_window import METHOD as SINK_WINDOW
from attn_backends.methods.sink_window import WindowSection
from attn_backends.methods.tidal_decode import METHOD as TIDAL_DECODE
from attn_backends.methods.tidal_decode import AnchorSection
from attn_backends.plan import LayerSchedule
from attn_backends.profile import SCHEMA_VERSION, Profile, load_profile
from vllm_ext.calibration import report, search
from vllm_ext.calibration.data import Sizes, make_examples
from vllm_ext.calibration.layer_similarity import least_important
from vllm_ext.calibration.probe import Budget, Probe, load_probed_model
from vllm_ext.calibration.search import Recording, Verdict
from vllm_ext.calibration.state import SavedState
from vllm_ext.errors import UserError

DENSE_LAYERS = 1
FORCED_TOKENS = BudgetConfig.sink_tokens, BudgetConfig.recent_tokens  # as servers by default
HELD_OUT_SEED = 1_000_003  # added to the seed: prompts that choose nothing
NUM_CANDIDATES = 6  # anchor sets of the proxy that are proven first
_NO_VERDICT_OF_ANCHORS = ("drop", "window_instead")  # settings that change none

Echo = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # what is done, how many are, of how many


@dataclass(frozen=True)
class AnchorSettings:
    """What is calibrated, for what, and on which prompts; the command's flags of these names.

    Attributes:
        model: folder of the checkpoint.
        anchors: how many anchor layers.
        budget_tokens: per KV head, which the profile is calibrated for.
        block_size: tokens per KV block.
        context_tokens: of the longest prompt.
        examples: prompts of each kind.
        verifications: end-to-end trials, at most.
        drop: how many layers of least effect are dropped.
        window_instead: those get a window (SINK_WINDOW's profile), and the others keep all.
        corpus: text file; None is Python's library.
        seed: of the choice of prompts.
    """

    model: Path
    anchors: int = 8
    budget_tokens: int = 512
    block_size: int = 32
    context_tokens: int = 4096
    examples: int = 8
    verifications: int = 40
    drop: int = 0
    window_instead: bool = False
    corpus: Path | None = None
    seed: int = 0

    def key(self) -> dict[str, str]:
        """What verdicts on anchors depend on, for ``SavedState``."""
        settings = {name: str(value) for name, value in vars(self).items()}
        kept = {key: text for key, text in settings.items() if key not in _NO_VERDICT_OF_ANCHORS}
        served = {"anchor_attention": "selected", "forced_tokens": str(FORCED_TOKENS)}
        return kept | served | {"fingerprint": fingerprint(self.model)}


def probed_budget(budget_tokens: int, block_size: int) -> Budget:
    """The blocks that a server of this block size reads under the method's default settings."""
    sinks, recent = (-(-forced_tokens // block_size) for forced_tokens in FORCED_TOKENS)
    return Budget(block_size, max(-(-budget_tokens // block_size), sinks + recent), sinks, recent)


class ProbedModel:
    """The checkpoint behind a probe, its tokenizer and what it is asked.

    Raises:
        UserError: a model of an unknown style.
    """

    def __init__(self, settings: AnchorSettings, progress: Progress) -> None:
        from transformers import AutoTokenizer

        torch.manual_seed(settings.seed)
        self._settings, self._progress = settings, progress
        self.probe = Probe(probed_budget(settings.budget_tokens, settings.block_size))
        self.model = load_probed_model(str(settings.model), self.probe)
        layers = getattr(getattr(self.model, "model", None), "layers", None)
        if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
            raise UserError(
                f"{settings.model}: only decoder-only models with model.layers, each with a "
                "self_attn, are known"
            )
        self._tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)

    def record(self, seed: int, num_each: int, title: str) -> list[Recording]:
        """One dense pass over the prompts of a seed."""
        settings = self._settings
        sizes = Sizes(settings.context_tokens, num_each)
        examples = make_examples(self._tokenizer, seed, settings.corpus, sizes)
        recordings = []
        for number, example in enumerate(examples):
            self._progress(title, number, len(examples))
            recordings.append(search.record(self.model, self.probe, example))
        self._progress(title, len(examples), len(examples))
        return recordings

    def verify(self, schedule: LayerSchedule, recordings: list[Recording]) -> Verdict:
        """See ``search.verify``; anchors attend their selection, as they do when served."""
        served = schedule.with_narrow_anchors()
        return search.verify(self.model, self.probe, served, recordings)


def check(
    settings: AnchorSettings, profiles: list[Path], progress: Progress
) -> Iterator[tuple[Path, Verdict]]:
    """Fidelity of existing profiles on the prompts of the seed; choose another seed than the
    one they were calibrated with.

    Raises:
        UserError: a profile is another checkpoint's.
        ConfigError: a profile is not valid, or not one of anchors.
    """
    schedules = {}
    for path in profiles:
        profile = load_profile(path)
        if profile.fingerprint != fingerprint(settings.model):
            raise UserError(f"{path} was made for another checkpoint ({profile.model})")
        section = profile.section(TIDAL_DECODE.name, AnchorSection)
        schedules[path] = section.schedule(profile.num_layers)
    probed = ProbedModel(settings, progress)
    recordings = probed.record(settings.seed, settings.examples, "prompts")
    for path, schedule in schedules.items():
        yield path, probed.verify(schedule, recordings)


def calibrate(
    settings: AnchorSettings, trials: SavedState, echo: Echo, progress: Progress
) -> tuple[Profile, torch.Tensor]:
    """Runs the stages described in ``vllm_ext.calibration.search``.

    Args:
        settings: what for.
        trials: verdicts that are known already; the others are added.
        echo: takes lines for people.
        progress: told of every step.

    Returns:
        The profile, and ``[num_layers a, num_layers b]`` errors for the report.

    Raises:
        UserError: a model of an unknown style, or more anchors or dropped layers than it has.
    """
    probed = ProbedModel(settings, progress)
    recordings = probed.record(settings.seed, settings.examples, "measuring reuse")
    errors, found = search.mean_errors(recordings), search.findings(probed.model, recordings)
    costs = search.layer_errors(errors)

    def schedule_of(anchors: tuple[int, ...]) -> LayerSchedule:
        return search.make_schedule(anchors, errors, DENSE_LAYERS)

    def judge(anchors: tuple[int, ...]) -> Verdict:
        known = trials.recall(str(anchors))
        if known is not None:
            return Verdict(**(known | {"anchors": anchors}))
        verdict = probed.verify(schedule_of(anchors), recordings)
        trials.keep(str(anchors), asdict(verdict))
        return verdict

    verdicts = _proven(settings, costs, judge, progress)
    best = verdicts[0]
    echo(report.verdict_line(f"chosen: anchors {list(best.anchors)}", best))
    least = _least_important(settings, best.anchors, found)
    if least:
        echo(f"{'window' if settings.window_instead else 'drop'} layers: {least}")
    schedule = schedule_of(best.anchors)
    if not settings.window_instead:
        schedule = search.without_layers(schedule, least)
    recordings.clear()  # the memory is needed for the others
    held_out = _held_out(settings, probed, schedule, echo)
    return _profile(settings, schedule, least, found, _figures(settings, verdicts, held_out)), costs


def _proven(
    settings: AnchorSettings,
    costs: torch.Tensor,
    judge: Callable[[tuple[int, ...]], Verdict],
    progress: Progress,
) -> list[Verdict]:
    """All verdicts of the search, best first."""
    candidates = search.best_anchor_sets(costs, settings.anchors, DENSE_LAYERS, NUM_CANDIDATES)
    if not candidates:
        raise UserError(f"--anchors is {settings.anchors}; the model has {len(costs)} layers")
    judged = itertools.count(1)

    def counted(anchors: tuple[int, ...]) -> Verdict:
        verdict = judge(anchors)
        progress("proving anchors", next(judged), settings.verifications)
        return verdict

    _, verdicts = search.search(candidates, len(costs), counted, settings.verifications)
    return sorted(verdicts, key=lambda verdict: verdict.loss)


def _least_important(
    settings: AnchorSettings, anchors: tuple[int, ...], found: Findings
) -> list[int]:
    protected = {*range(DENSE_LAYERS), *anchors}
    try:
        return least_important(found.layer_similarity, protected, settings.drop)
    except ValueError as error:
        raise UserError(f"--drop is {settings.drop}: {error}") from None


def _held_out(
    settings: AnchorSettings, probed: ProbedModel, schedule: LayerSchedule, echo: Echo
) -> dict[int, Verdict]:
    """Verdicts on prompts that chose nothing, by budget in tokens: half, the asked one, twice."""
    num_each = max(2, settings.examples // 2)
    recordings = probed.record(settings.seed + HELD_OUT_SEED, num_each, "held out")
    verdicts = {}
    for factor in (0.5, 1, 2):
        budget_tokens = int(settings.budget_tokens * factor)
        probed.probe.budget = probed_budget(budget_tokens, settings.block_size)
        verdict = verdicts[budget_tokens] = probed.verify(schedule, recordings)
        echo(report.verdict_line(f"held out, {budget_tokens} tokens", verdict))
    return verdicts


def _figures(
    settings: AnchorSettings, verdicts: list[Verdict], held_out: dict[int, Verdict]
) -> dict[str, Any]:
    """What the profile says of its making."""
    names = ("budget_tokens", "block_size", "context_tokens", "examples", "seed")
    return {name: getattr(settings, name) for name in names} | {
        "held_out": {str(budget): asdict(verdict) for budget, verdict in held_out.items()},
        "verdicts": [asdict(verdict) for verdict in verdicts[:10]],
    }


def _profile(
    settings: AnchorSettings,
    schedule: LayerSchedule,
    least: list[int],
    found: Findings,
    figures: dict[str, Any],
) -> Profile:
    """A section for TIDAL_DECODE; with layers to drop one for SINK_WINDOW, which drops them, too,
    or gives them the window.
    """
    config, num_layers = read_model_config(settings.model), len(schedule.roles)
    profile = Profile(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint(settings.model),
        model=settings.model.name,
        num_layers=num_layers,
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        findings=found,
        calibration=figures,
    ).with_section(TIDAL_DECODE.name, AnchorSection.of(schedule))
    if not least:
        return profile
    if not settings.window_instead:
        return profile.with_section(SINK_WINDOW.name, WindowSection(drop_layers=least))
    full = [layer for layer in range(num_layers) if layer not in least]
    return profile.with_section(SINK_WINDOW.name, WindowSection(full_layers=full))
