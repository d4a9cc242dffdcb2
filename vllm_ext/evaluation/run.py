"""Runs the methods over the prompts: every prompt is prefilled once per engine and shared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from attn_backends.config import known_settings, parse_config, settings_of
from attn_backends.method import SparseMethod
from attn_backends.methods import load_method
from vllm_ext.engine_process import SMALL_GPU_SHARE, EngineProcess
from vllm_ext.errors import UserError
from vllm_ext.evaluation.prompts import NeedlePrompt
from vllm_ext.forcing import CLASS_PATH, KEY
from vllm_ext.plugin import DISABLE_ENV

DENSE = "dense"
ANSWER_TOKENS = 24
PROMPTS_AT_ONCE = 8


@dataclass(frozen=True)
class Column:
    """One column of the table: a method at a budget, or dense.

    Attributes:
        name: what the table shows.
        method: of the registry; it serves dense, too, when ``extra_args`` say so.
        settings: of the engine; columns with the same ones share it.
        extra_args: of each request.
    """

    name: str
    method: str
    settings: dict[str, Any]
    extra_args: dict[str, Any] | None


def make_columns(methods: list[str], budgets: list[int], settings: dict[str, Any]) -> list[Column]:
    """Dense first, then every method at every budget.

    Methods that let a request choose its budget need one engine for all; the others, whose
    reach is fixed at start, one for each; those without a reach (``SparseMethod.reach``) have one
    column. Settings that a method does not know are not given to it.

    Raises:
        ConfigError: settings or a budget that a method refuses.
    """
    columns = []
    for name in methods:
        method = load_method(name)
        own = known_settings(method.config_cls, settings)
        for budget in budgets:
            reaching = settings_reaching(method, own, budget)
            if reaching is None:
                columns.append(Column(name, name, own, None))
                break
            title = f"{name}@{budget}"
            if "budget_tokens" in method.row_options:
                columns.append(Column(title, name, own, {"budget_tokens": budget}))
            else:
                columns.append(Column(title, name, reaching, None))
    for column in columns:  # before the first engine starts
        config = parse_config(load_method(column.method).config_cls, column.settings, column.method)
        if config.draft_tokens:
            raise UserError(
                f"--lossless-tokens is {config.draft_tokens}: answers are stock vLLM's then, and "
                "there is nothing to compare; drop it"
            )
    elastic = next((c for c in columns if "sparse" in load_method(c.method).row_options), None)
    if elastic is None:
        return [Column(DENSE, "SPARSE_FULL", {}, None), *columns]
    return [Column(DENSE, elastic.method, elastic.settings, {"sparse": "off"}), *columns]


def settings_reaching(
    method: SparseMethod, settings: dict[str, Any], budget_tokens: int
) -> dict[str, Any] | None:
    """Settings with which a decode row reads that many tokens in a sparse layer.

    Args:
        method: its ``reach`` says which setting gives way.
        settings: given beside the budget.
        budget_tokens: to be read.

    Returns:
        None for a method without a reach.
    """
    options = settings_of(method.config_cls)
    defaults: dict[str, Any] = {name: option.default for name, option in options.items()}
    reach = [name for name in method.reach if name in defaults]
    if not reach:
        return None
    *fixed, varied = reach
    rest_tokens = sum((defaults | settings)[name] for name in fixed)
    return settings | {varied: max(1, budget_tokens - rest_tokens)}


@dataclass(frozen=True)
class Job:
    """What is asked.

    Attributes:
        model: folder.
        needles: prompts with answers.
        texts: token ids of prompts to continue.
        long_texts: token ids of prompts whose own tokens are scored.
        text_steps: decode steps compared per text.
        decode: token ids to text.
        kv_bytes: KV pool of an engine.
        max_model_len: of an engine, tokens.
        dtype: of weights and KV cache.
    """

    model: str
    needles: list[NeedlePrompt]
    texts: list[list[int]]
    long_texts: list[list[int]]
    text_steps: int
    decode: Callable[[list[int]], str]
    kv_bytes: int
    max_model_len: int
    dtype: str


class Evaluation:
    """Results by column, filled engine by engine."""

    def __init__(
        self, job: Job, columns: list[Column], progress: Callable[[str, int], None]
    ) -> None:
        self._job, self._columns, self._progress = job, columns, progress
        self._dense_tokens: list[list[int]] = []
        self._vocabulary = 0
        self.needles: list[dict[str, Any]] = [
            {key: value for key, value in asdict(prompt).items() if key != "ids"}
            | {"prompt_tokens": len(prompt.ids), "scores": {}, "texts": {}}
            for prompt in job.needles
        ]
        self.texts: dict[str, dict[str, list[float]]] = {}
        self.scores: dict[str, list[list[float]]] = {}  # log-probabilities of long texts' tokens

    def run(self, vocabulary: int) -> None:
        """All engines, one after another."""
        self._vocabulary = vocabulary
        with tempfile.TemporaryDirectory() as folder:
            for group in _by_engine(self._columns):
                engine = self._start(group[0])
                try:
                    self._run_needles(engine, group)
                    self._run_texts(engine, group, Path(folder))
                    self._run_long_texts(engine, group[0])
                finally:
                    engine.close()

    def _start(self, column: Column) -> EngineProcess:
        job = self._job
        engine = {
            "model": job.model,
            "attention_backend": column.method,
            "additional_config": {"vllm_ext": column.settings} if column.settings else {},
            "max_model_len": job.max_model_len,
            "dtype": job.dtype,
            "max_num_seqs": 64,
            "kv_cache_memory_bytes": job.kv_bytes,
            "gpu_memory_utilization": SMALL_GPU_SHARE,
            "enable_prefix_caching": True,
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "logits_processors": [CLASS_PATH],
            "seed": 0,
        }
        # In one process: the processor's results are read where it runs.
        env: dict[str, str | None] = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        env |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", DISABLE_ENV: None}  # nothing is timed
        return EngineProcess(column.method, engine, env)

    def _run_needles(self, engine: EngineProcess, columns: list[Column]) -> None:
        for first in range(0, len(self._job.needles), PROMPTS_AT_ONCE):
            prompts = self._job.needles[first : first + PROMPTS_AT_ONCE]
            # The first column prefills; the others find its blocks.
            for part in (columns[:1], columns[1:]):
                asked = [(column, prompt) for column in part for prompt in prompts]
                if not asked:
                    continue
                answer = engine.generate(
                    [prompt.ids for _, prompt in asked],
                    ANSWER_TOKENS,
                    [column.extra_args for column, _ in asked],
                )
                for index, ((column, prompt), ids) in enumerate(
                    zip(asked, answer["tokens"], strict=True)
                ):
                    text = self._job.decode(ids)
                    record = self.needles[first + index % len(prompts)]
                    record["texts"][column.name] = text
                    record["scores"][column.name] = prompt.score(text)
            self._progress(engine.name, len(prompts) * len(columns))

    def _run_texts(self, engine: EngineProcess, columns: list[Column], folder: Path) -> None:
        job = self._job
        files = [folder / f"{number}.npy" for number in range(len(job.texts))]
        for first in range(0, len(job.texts), PROMPTS_AT_ONCE):
            numbers = range(first, min(first + PROMPTS_AT_ONCE, len(job.texts)))
            prompts = [job.texts[number] for number in numbers]
            if columns[0].name == DENSE:
                for number in numbers:
                    _empty(files[number], (job.text_steps, self._vocabulary))
                extra = [
                    (columns[0].extra_args or {}) | {KEY: {"file": str(files[n]), "tokens": None}}
                    for n in numbers
                ]
                self._dense_tokens += engine.generate(prompts, job.text_steps, extra)["tokens"]
            # Dense against itself, too: what remains there is the noise of the arithmetic.
            for column in columns:
                forced = [
                    {
                        "name": column.name,
                        "file": str(files[number]),
                        "tokens": self._dense_tokens[number],
                    }
                    for number in numbers
                ]
                extra = [(column.extra_args or {}) | {KEY: asked} for asked in forced]
                found = engine.generate(prompts, job.text_steps, extra)["forced"][column.name]
                wanted = len(prompts) * job.text_steps
                if len(found) != wanted:  # a preempted request repeats steps
                    raise UserError(
                        f"{column.name}: {len(found)} steps were compared instead of {wanted}, so "
                        "requests were preempted; give the engines a larger KV pool (--kv-gib)"
                    )
                steps = self.texts.setdefault(column.name, {"kl": [], "agrees": []})
                steps["kl"] += [kl for kl, _ in found]
                steps["agrees"] += [float(agrees) for _, agrees in found]
            self._progress(engine.name, len(prompts) * len(columns))

    def _run_long_texts(self, engine: EngineProcess, column: Column) -> None:
        """One text at a time. A method whose prefill is dense scores like dense: the first of
        its columns stands for all.
        """
        self.scores[column.name] = [engine.score([ids])[0] for ids in self._job.long_texts]


def _by_engine(columns: list[Column]) -> Iterable[list[Column]]:
    groups: dict[tuple[str, str], list[Column]] = {}
    for column in columns:
        groups.setdefault((column.method, repr(sorted(column.settings.items()))), []).append(column)
    return groups.values()


def _empty(path: Path, shape: tuple[int, int]) -> None:
    numpy.save(path, numpy.zeros(shape, dtype=numpy.float32))
