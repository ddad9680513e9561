"""What a training run asks while it trains: questions that are read once, and an engine made anew for every evaluation.

RUN/evaluations/step_00000500/    a run of the evaluation, as hrm-text eval leaves it (hrm_text.eval.runs)
"""

from __future__ import annotations

import gc
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.data.loader import read_metadata
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.storage import under
from hrm_text.data.tokenizer import load_tokenizer, run_tokenizer, tokenizer_file, tokenizer_info
from hrm_text.eval.runs import Plan, plan_run, run
from hrm_text.eval.sources import HubRows, LocalRows
from hrm_text.eval.task import Task
from hrm_text.eval.tasks import find_tasks
from hrm_text.files import read_json
from hrm_text.infer import memory
from hrm_text.infer.text_model import TextModel
from hrm_text.model.origin import checksum
from hrm_text.model.weights import empty, parse_dtype
from hrm_text.recipes.evaluation import SCORING_PACKAGES, EngineAnswerer, sources_of_data
from hrm_text.recipes.provenance import installed, machine, versions
from hrm_text.train.config import TrainConfig
from hrm_text.train.evaluation import Scores
from hrm_text.train.loop import resolved

MEASURES = ("strict", "low", "high", "published", "unreadable", "truncated", "mean_tokens")
"""Of a task, that become curves."""

PAGES_OF = 64
"""Tokens to which the room of a text is rounded up: a multiple of the engine's pages on every device."""


class RunEvaluator:
    """Asks the questions that a run's settings name; the ``Evaluator`` of ``hrm_text.train``.

    Between evaluations it holds the questions alone. While one runs there are the weights as they are handed in, and
    keys and values for ``evaluate.batch`` texts of the longest questions, or as many as there is memory for.
    """

    def __init__(self, settings: TrainConfig) -> None:
        """Read the questions.

        Args:
            settings: of a run whose data are sampled.

        Raises:
            UserError: ``evaluate`` cannot be done: an unknown task, no data, a task that runs code, questions that are
                longer than the context; or the run's tokenizer is not there.
        """
        settings = resolved(settings)
        self.config, self.asked = settings.model, settings.evaluate
        self.device, self.dtype = settings.device, settings.dtype
        self.folder = settings.run / "evaluations"
        self.sources = sources_of_data(settings.data.sampled)
        assert settings.data.sampled is not None
        self.prompt_format = _prompt_format(settings)
        tasks = find_tasks(self.asked.tasks, limit=self.asked.limit, seed=self.asked.seed)
        if code := [task.name for task in tasks if task.runs_code]:
            raise UserError(
                f"evaluate.tasks: {', '.join(code)}: scored by running what the model wrote, which no training run "
                "does. Leave it out, and ask checkpoints with hrm-text eval --allow-code"
            )
        rows = HubRows() if self.asked.data is None else LocalRows(self.asked.data)
        # A model without memory: it says how long prompts are, and what room there is.
        answerer = EngineAnswerer(TextModel(empty(self.config), self.prompt_format), self.asked.batch)
        identity = {
            "settings": {"device": torch.device(self.device).type, "dtype": self.dtype},
            "versions": versions() | installed(SCORING_PACKAGES),
        }
        self.plan = plan_run(tasks, rows, answerer, identity=identity, limit=self.asked.limit, seed=self.asked.seed)
        for task in tasks:
            if not any(item.max_new_tokens for item in self.plan.items if item.task is task):
                raise UserError(
                    f"evaluate.tasks: no question of {task.name!r} leaves room for a response: the context of the run "
                    f"is {answerer.context:,} tokens"
                )
        self.cache_tokens = cache_tokens(self.plan, answerer, self.asked.batch)
        """Tokens of prompts and responses that the engine has room for, if there is memory for them."""

    @property
    def questions(self) -> int:
        """How many are asked."""
        return len(self.plan.items)

    @property
    def description(self) -> str:
        """See ``Evaluator``."""
        per_token = memory.bytes_per_token(self.config, parse_dtype(self.dtype))
        asked, mebibytes = self.asked, self.cache_tokens * per_token / 2**20
        return (
            f"evaluating {self.questions:,} questions of {', '.join(names(self.plan.tasks))} after every "
            f"{asked.every_steps:,} steps, {asked.batch} at a time with at most {mebibytes:.1f} MiB of keys and "
            f"values, in at most {asked.most_share:.1%} of the time"
        )

    def __call__(self, step: int, weights: Mapping[str, Tensor], progress: Callable[[float], None]) -> Scores:
        """See ``Evaluator``. Weights that were asked already are not asked again: a killed run comes back here."""
        self._give_back()  # what the training step will take again: the engine asks how much is free
        try:
            return self._scores(step, weights, progress)
        finally:
            gc.collect()  # recorded steps are part of cycles
            self._give_back()

    def _give_back(self) -> None:
        """Return what PyTorch keeps of a GPU's memory without using it."""
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _scores(self, step: int, weights: Mapping[str, Tensor], progress: Callable[[float], None]) -> Scores:
        module = empty(self.config)
        module.load_state_dict(dict(weights), assign=True)
        module.requires_grad_(False)
        done = 0.0

        def on_progress(there: float, total: float) -> None:
            nonlocal done
            done = there / total

        there_is = memory.cache_tokens(
            self.config, module.lm_head.weight.dtype, module.lm_head.weight.device, self.asked.batch
        )
        answerer = EngineAnswerer(
            TextModel(module, self.prompt_format),
            self.asked.batch,
            min(self.cache_tokens, there_is),
            lambda: progress(done),
        )
        of_step = {"step": step, "weights_sha256": checksum(weights)}
        plan = replace(self.plan, identity=of_step | dict(self.plan.identity))
        folder = self.folder / f"step_{step:08d}"
        _clear(folder, plan)
        results = run(
            plan, answerer, folder, machine=machine(self.device), sources=self.sources, on_progress=on_progress
        )
        return {
            name: {measure: score[measure] for measure in MEASURES}
            for name, score in zip(names(plan.tasks), results["scores"], strict=True)
        }


def cache_tokens(plan: Plan, answerer: EngineAnswerer, batch: int) -> int:
    """Tokens of the ``batch`` longest texts that a plan may lead to."""
    lengths = sorted(
        answerer.num_tokens(item.condition, item.prompt) + item.max_new_tokens + 1
        for item in plan.items
        for _ in range(item.task.samples)
        if item.max_new_tokens
    )
    return sum(-(-length // PAGES_OF) * PAGES_OF for length in lengths[-batch:])


def names(tasks: Sequence[Task]) -> list[str]:
    """Of the curves: each task's own, with its condition where there are several of that name."""
    counts = Counter(task.name for task in tasks)
    return [
        task.name if counts[task.name] == 1 else f"{task.name}:{task.condition.replace(',', '+')}" for task in tasks
    ]


def _clear(folder: Path, plan: Plan) -> None:
    """Remove an evaluation of other weights or questions: of a run that was set back and went another way."""
    note = folder / "run.json"
    if note.is_file():
        before: Any = read_json(note)
        if before.get("identity") != json.loads(json.dumps(plan.identity)):
            shutil.rmtree(folder)


def _prompt_format(settings: TrainConfig) -> PromptFormat:
    """Of the tokenizer that the data were made with."""
    assert settings.data.sampled is not None
    info = read_metadata(under(settings.data.sampled, "metadata.json"))["tokenizer_info"]
    place = Path(info.get("tokenizer_path") or "unnamed")
    if not tokenizer_file(place).is_file():
        raise UserError(
            f"evaluate.tasks: {settings.data.sampled} was made with the tokenizer {place}, which is not there; "
            "questions cannot be asked without it. Put it back, or leave evaluate.tasks out"
        )
    return PromptFormat(load_tokenizer(run_tokenizer(info)), tokenizer_info(place))
