"""Evaluation of weights: an engine that answers, what a score depends on besides, two models compared."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hrm_text.contracts import UserError
from hrm_text.eval.answers import Answer, Asked
from hrm_text.eval.comparison import compare
from hrm_text.eval.held_in import RELEASED, Sources, trained_sources
from hrm_text.eval.runs import Plan, plan_run, run
from hrm_text.eval.sources import HubRows, LocalRows
from hrm_text.eval.task import Task
from hrm_text.eval.tasks import find_tasks
from hrm_text.files import only_process, sha256, write_json
from hrm_text.infer.requests import KeyValues, Request, Sampling, Turn
from hrm_text.infer.text_model import Quantize, TextModel, is_checkpoint, load
from hrm_text.model.checkpoint_files import find_checkpoint, load_state
from hrm_text.recipes.evaluation_report import write_evaluation_report
from hrm_text.recipes.provenance import installed, machine, versions

RUNS = Path("runs/eval")
"""Where runs lie that are given no folder."""

SCORING_PACKAGES = (
    "datasets",
    "math-verify",
    "latex2sympy2_extended",
    "antlr4-python3-runtime",
    "sympy",
    "py3langid",
    "reasoning-gym",
)
"""Rows as they are read, MATH and AIME (the three that math-verify stands on among them), IFEval, reasoning-gym."""

Say = Callable[[str], None]
Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class Settings:
    """What to ask, and how."""

    tasks: tuple[str, ...]
    """Names, as ``find_tasks`` reads them."""
    conditions: tuple[str, ...] = ()
    """A grid; empty is each task's own."""
    limit: int | None = None
    seed: int = 0
    data: Path | None = None
    """Folder of the benchmarks' files; None is the hub."""
    mixture: Path | None = None
    """What the model was trained upon: see ``sources_of``."""
    batch: int = 128
    """Slots of the engine; changes no answer."""
    device: str = "cpu"
    dtype: str = "float32"
    quantize: Quantize = "none"
    kv_cache: KeyValues = "auto"
    allow_code: bool = False
    """Whether what a model writes may be executed, for tasks that are scored so."""


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    out: Path
    results: Mapping[str, Any]


class EngineAnswerer:
    """One engine, to which everything is submitted at once: it fills a slot as soon as one falls free."""

    def __init__(
        self,
        model: TextModel,
        max_batch: int = 128,
        cache_tokens: int | None = None,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        """The engine takes its memory with the first question.

        Args:
            model: what answers.
            max_batch: slots.
            cache_tokens: that the engine has room for; None: as many as the memory left takes.
            before_step: called before every step of the engine; what it raises ends the asking.

        Raises:
            UserError: max_batch below 1.
        """
        if max_batch < 1:
            raise UserError(f"--batch must be at least 1, found {max_batch}")
        self.model, self.max_batch = model, max_batch
        self.cache_tokens, self.before_step = cache_tokens, before_step
        self.seconds, self.prompt_tokens, self.new_tokens = 0.0, 0, 0
        self._steps = self._steps_before_tail = self._rows_before_tail = 0

    @property
    def context(self) -> int:
        """Tokens of prompt and response."""
        return self.model.config.max_position_embeddings

    def num_tokens(self, condition: str, prompt: str) -> int:
        """Tokens of a prompt with its condition."""
        return len(self.model.prompt_format.prefix_ids(condition, prompt))

    def ask(self, asked: Sequence[Asked], told: Callable[[int, Answer], None]) -> None:
        """Answer all; see ``Answerer``.

        The order: what may become longest first, so that it does not run on alone in the end; then by the length of the
        prompt, so that a pass over prompts holds equal ones. Prompts of a task with the same examples so come together,
        and equal prompts (samples of one question) next to each other: those are computed once. More cannot be shared:
        under PrefixLM examples see the question behind them, so that their keys and values are of one prompt alone.
        """
        started = time.perf_counter()
        prefixes = self.model.prompt_format.prefix_ids_batch([a.condition for a in asked], [a.prompt for a in asked])
        order = sorted(range(len(asked)), key=lambda n: (-asked[n].max_new_tokens, len(prefixes[n]), prefixes[n], n))
        engine = self.model.engine(
            max_batch=self.max_batch, cache_tokens=self.cache_tokens, kv_cache=self.model.kv_cache
        )
        numbers = {}
        for index in order:
            one = asked[index]
            sampling = Sampling(temperature=one.temperature, top_p=one.top_p, seed=one.seed)
            numbers[engine.submit(Request((Turn(tuple(prefixes[index])),), one.max_new_tokens, sampling))] = index
        texts: dict[int, list[str]] = defaultdict(list)
        status = engine.status
        before_tail = status
        while engine.has_work:
            self.before_step()
            for piece in engine.step(fill=True):
                texts[piece.request].append(piece.text)
                if piece.finish_reason is not None:
                    assert piece.finish_reason != "cancelled"
                    text = "".join(texts.pop(piece.request))
                    told(numbers[piece.request], Answer(text, piece.num_tokens, piece.finish_reason))
            status = engine.status
            if status.waiting:
                before_tail = status
        self._steps += status.steps_total
        self._steps_before_tail += before_tail.steps_total
        self._rows_before_tail += before_tail.rows_total
        self.seconds += time.perf_counter() - started
        self.prompt_tokens += status.prompt_tokens_total - status.cached_prompt_tokens_total
        self.new_tokens += status.generated_tokens_total

    def speed(self) -> dict[str, float]:
        """Of all that was asked: seconds, tokens per second, and the share of slots with a text until the tail.

        The tail begins with the step after which nobody waits. Before it every free slot is a loss; within it there is
        nothing left to fill one with. A response of one token comes with the pass over its prompt, and takes no step.
        """
        seconds = self.seconds or 1.0
        steps = self._steps_before_tail
        return {
            "batch": self.max_batch,
            "seconds": self.seconds,
            "prompt_tokens_per_second": self.prompt_tokens / seconds,
            "tokens_per_second": self.new_tokens / seconds,
            "busy_slots": self._rows_before_tail / (steps * self.max_batch) if steps else 1.0,
            "steps": self._steps,
            "steps_of_tail": self._steps - steps,
        }


def evaluate_weights(
    weights: Path,
    settings: Settings,
    out: Path | None = None,
    *,
    on_progress: Progress | None = None,
    say: Say = print,
) -> Outcome:
    """Evaluate the weights in a folder, or go on with it.

    Args:
        weights: a weights folder, a training run or a checkpoint.
        settings: what to ask, and how.
        out: the run's folder; None: one below ``RUNS`` whose name is of the weights, and of everything that a score
            depends on. The same command so finds its own run again, and no other does. It is not beside the weights:
            these may lie where others only read, or be copied, hashed and published with all that is in their folder.
        on_progress: called with the responses that are there, and their number in all.
        say: told where the run lies.

    Raises:
        UserError: see ``plan_run`` and ``run``; or a task runs code, and that is not allowed.
    """
    tasks = find_tasks(settings.tasks, conditions=settings.conditions, limit=settings.limit, seed=settings.seed)
    if code := [task.name for task in tasks if task.runs_code and not settings.allow_code]:
        raise UserError(
            f"{', '.join(code)}: scored by running what the model wrote; allow it with --allow-code, "
            "on a machine that you can spare"
        )
    asked = find_checkpoint(weights, warnings.warn) if is_checkpoint(weights) else weights
    sources = sources_of(asked, settings.mixture)
    rows = HubRows() if settings.data is None else LocalRows(settings.data)
    model = load(
        asked,
        device=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        kv_cache=settings.kv_cache,
    )
    answerer = EngineAnswerer(model, settings.batch)
    identity = {
        "weights_sha256": weights_hash(asked),
        "settings": {
            "device": torch.device(settings.device).type,
            **{name: getattr(settings, name) for name in ("dtype", "quantize", "kv_cache")},
        },
        "versions": versions() | installed(SCORING_PACKAGES),
    }
    plan = plan_run(tasks, rows, answerer, identity=identity, limit=settings.limit, seed=settings.seed)
    folder = out or RUNS / default_name(weights, plan)
    say(f"{folder}: {len(plan.items):,} questions")
    with only_process(folder):
        here = machine(settings.device)
        results = run(plan, answerer, folder, machine=here, sources=sources, on_progress=on_progress)
        write_evaluation_report(folder, short_name(weights))
    return Outcome(folder, results)


def evaluate_model(
    model: TextModel,
    tasks: Sequence[Task],
    out: Path,
    *,
    identity: Mapping[str, Any],
    batch: int = 128,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a model that is in memory upon tasks that read no data set, or go on with it.

    Args:
        model: what answers.
        tasks: of ``exact_task``.
        out: the run's folder.
        identity: of the model and whatever else answers depend on, as JSON.
        batch: slots of the engine.
        on_progress: called with the responses that are there, and their number in all.

    Returns:
        What ``results.json`` holds.
    """
    answerer = EngineAnswerer(model, batch)
    plan = plan_run(tasks, HubRows(), answerer, identity=identity)
    device = next(model.module.parameters()).device.type
    with only_process(out):
        return run(plan, answerer, out, machine=machine(device), on_progress=on_progress)


def compare_weights(
    weights: Path,
    other: Path,
    settings: Settings,
    out: Path | None = None,
    *,
    on_progress: Progress | None = None,
    say: Say = print,
) -> tuple[Outcome, Outcome, list[dict[str, Any]]]:
    """Evaluate two models on the same questions, and compare them in pairs.

    The second lies in ``out/against``, or without ``out`` in a folder of its own as any run does: what is there already
    is not asked again. The comparison is written to ``comparison.json`` beside the first's results.
    """
    first = evaluate_weights(weights, settings, out, on_progress=on_progress, say=say)
    second = evaluate_weights(other, settings, out and out / "against", on_progress=on_progress, say=say)
    rows = [asdict(row) for row in compare(first.out, second.out)]
    found = {
        name: {
            "weights": short_name(folder),
            "run": str(outcome.out),
            "weights_sha256": outcome.results["weights_sha256"],
        }
        for name, folder, outcome in (("first", weights, first), ("second", other, second))
    } | {
        "test": "exact sign test, two-sided (McNemar's where scores are 0 or 1)",
        "rows": rows,
    }
    write_json(first.out / "comparison.json", found)
    write_evaluation_report(first.out, short_name(weights))
    return first, second, rows


def default_name(weights: Path, plan: Plan) -> str:
    """Of a run's folder: its weights, and ten digits of what its scores depend on."""
    digest = hashlib.sha256(json.dumps(plan.identity, sort_keys=True, default=str).encode()).hexdigest()
    return f"{short_name(weights).replace('/', '-')}-{digest[:10]}"


def short_name(weights: Path) -> str:
    """What people may call a folder of weights by: its name and its parent's. The whole path says where they live."""
    whole = weights.resolve()
    return "/".join(part for part in whole.parts[-2:] if part != whole.anchor)


def sources_of(weights: Path, mixture: Path | None) -> Sources | None:
    """What a model was trained upon, as far as is known.

    Args:
        weights: a weights folder, or a checkpoint, which names its run's sampled data.
        mixture: a sampled folder, "released", or None: what the weights say.

    Raises:
        UserError: the mixture is given and is none.
    """
    if mixture is not None:
        return RELEASED if str(mixture) == RELEASED else trained_sources(mixture)
    if not (weights / "manifest.json").is_file():
        return None
    return sources_of_data(load_state(weights).config["data"].get("sampled"))


def sources_of_data(sampled: object) -> Sources | None:
    """Those of a run's sampled data, if they are still there: not known of data elsewhere, or of plain records."""
    here = Path(str(sampled))
    return trained_sources(here) if sampled is not None and (here / "sampling.json").is_file() else None


def weights_hash(weights: Path) -> str:
    """A checksum of what a model computes with: the tensors, the configuration, the tokenizer.

    Of a weights folder the content of its JSON and safetensors files by name; of a checkpoint that of its manifest,
    which has the checksums of all files.
    """
    if (weights / "manifest.json").is_file():
        return sha256(weights / "manifest.json")
    files = sorted(path for path in weights.iterdir() if path.suffix in (".json", ".safetensors"))
    content = [[path.name, sha256(path)] for path in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
