"""The quickstart: from nothing to a trained, evaluated, answering and exported HRM-Text model, with a report.

Every stage leaves files and is found again: interrupted anywhere and started again, the run continues from the last
finished piece of work and ends with the same model.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import rich.console
import torch

from hrm_text import __version__
from hrm_text.convert.huggingface import export
from hrm_text.data.procedural import CPU_WEIGHTS, generate
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.records import BadRecords, find_record_files, read_texts, write_jsonl
from hrm_text.data.sample import SampleSummary, sample_epochs
from hrm_text.data.sources import build_gpu_mixture
from hrm_text.data.sources.registry import SOURCES
from hrm_text.data.tokenize import TokenizeSummary, tokenize_files
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_info, train_tokenizer
from hrm_text.eval.exact import given_questions
from hrm_text.eval.scores import TaskScore
from hrm_text.eval.statistics import mean
from hrm_text.eval.task import Task
from hrm_text.eval.tasks import find_tasks
from hrm_text.eval.tasks.held_out import held_out_task
from hrm_text.files import read_json, write_json
from hrm_text.infer.text_model import TextModel, load
from hrm_text.model.attention import Spans
from hrm_text.model.kernels import packed_attention
from hrm_text.model.plan import Step, call_names, plan
from hrm_text.model.recurrence import build
from hrm_text.model.weights import parse_dtype
from hrm_text.recipes.display import Display
from hrm_text.recipes.evaluation import evaluate_model, weights_hash
from hrm_text.recipes.presets import QuickstartPreset, find_preset
from hrm_text.recipes.provenance import machine, versions
from hrm_text.recipes.quickstart_outcome import direct_vs_cot, print_outcome, read_answered, read_lines, samples
from hrm_text.recipes.quickstart_paths import Paths
from hrm_text.recipes.report import Run, write_report
from hrm_text.recipes.stages import Progress, Stage
from hrm_text.settings import from_mapping, to_mapping
from hrm_text.train.config import TrainConfig, plain
from hrm_text.train.hooks import Hook, JsonlMetrics, TensorBoard
from hrm_text.train.loop import Trainer, resolved
from hrm_text.train.metrics import device_memory_bytes

STEP_BY_STEP = "cot"


class Quickstart:
    """One run of the quickstart in one folder."""

    def __init__(self, preset: QuickstartPreset, out: Path, seed: int = 0) -> None:
        self.preset, self.seed = preset, seed
        self.paths = Paths(out)
        self.progress = Progress(out, {"seed": seed, "preset": to_mapping(preset), "hrm-text": __version__})

    def run(self, display: Display) -> Run:
        """Do every stage that is not finished; the result is what the report shows."""
        with display.shown():
            self.progress.run(
                [
                    Stage("records", self.make_records),
                    Stage("tokenizer", self.make_tokenizer),
                    Stage("tokenise", self.tokenise),
                    Stage("sample", self.sample),
                    Stage("test before", self.evaluate_untrained),
                    Stage("train", self.train),
                    Stage("export", self.export),
                    Stage("test after", self.evaluate_trained),
                    Stage("report", self.report),
                ],
                display,
            )
        run: Run = read_json(self.paths.result("run"))
        return run

    # -------------------------------------------------------------------------------------------------------- stages --

    def make_records(self, display: Display) -> str:
        """Draw the training and the held-out records: one file per task or source."""
        preset, out = self.preset, self.paths.records
        if preset.data == "mixture":
            workers = os.cpu_count() or 1
            reports = build_gpu_mixture(
                out,
                self.seed,
                scale=preset.scale,
                workers=workers,
                on_progress=lambda report, done, total: display.progress(done, total, f"{done}/{total} files"),
            )
            examples = sum(report.examples for report in reports)
            return f"{examples:,} examples of {len(reports)} files, {sum(r.held_out for r in reports):,} held out"
        total_weight = sum(CPU_WEIGHTS.values())
        for split, examples in (("train", preset.examples), ("held_out", preset.held_out_examples)):
            for number, (task, weight) in enumerate(CPU_WEIGHTS.items()):
                share = round(examples * weight / total_weight)
                path = out / split / f"{task}.jsonl"
                write_jsonl(path, generate({task: 1}, share, self.seed, "train" if split == "train" else "held_out"))
                display.progress(number + 1, len(CPU_WEIGHTS), f"{split}: {task}")
        return f"{preset.examples:,} examples of {len(CPU_WEIGHTS)} tasks, {preset.held_out_examples:,} held out"

    def make_tokenizer(self, display: Display) -> str:
        """Train the tokenizer on the training records."""
        files = find_record_files([self.paths.records / "train"])
        texts = read_texts(files, BadRecords(strict=True))
        train_tokenizer(texts, self.preset.vocab_size, self.paths.tokenizer)
        found = tokenizer_info(self.paths.tokenizer)["vocab_size"]
        return f"byte-level BPE, {found:,} entries"

    def tokenise(self, display: Display) -> str:
        """Turn records into token ids."""
        summary: TokenizeSummary | None = None
        for split in ("held_out", "train"):
            summary = tokenize_files(
                [self.paths.records / split],
                self.paths.tokenizer,
                self.paths.store(split),
                strict=True,
                on_progress=lambda done, total: display.progress(
                    done, total, f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
                ),
            )
        assert summary is not None
        return f"{summary.tokens:,} tokens, {summary.tokens / summary.records:.1f} a record"

    def sample(self, display: Display) -> str:
        """Draw the epochs."""
        summary: SampleSummary | None = None
        for split, epochs in (("held_out", 1), ("train", self.preset.epochs)):
            store, sampled = self.paths.store(split), self.paths.sampled(split)
            summary = sample_epochs(store, sampled, [], epochs, self.seed, self.preset.max_seq_len)
        assert summary is not None
        return f"{sum(summary.tokens_per_epoch):,} tokens in {self.preset.epochs} epoch(s)"

    def evaluate_untrained(self, display: Display) -> str:
        """Ask the untrained model, so that the report can say what training changed."""
        config = resolved(self.train_config)
        module = build(config.model, seed=config.seed, device=config.device, dtype=parse_dtype(config.dtype))
        info = tokenizer_info(self.paths.tokenizer)
        engine = TextModel(module, PromptFormat(load_tokenizer(self.paths.tokenizer), info))
        tasks, untrained = self._tasks(self.preset.items_before), f"untrained, seed {config.seed}"
        scores = self._evaluate(engine, tasks, display, "before", untrained)
        write_json(self.paths.result("norms_before"), self.state_norms(engine))
        return f"{mean([score.strict for score in scores]):.1%} right"

    def train(self, display: Display) -> str:
        """Train, or continue to."""
        paths = self.paths
        hooks: list[Hook] = [display, JsonlMetrics(paths.run / "metrics.jsonl"), TensorBoard(paths.run / "tensorboard")]
        trainer = Trainer(self.train_config, hooks)
        summary = trainer.run()
        if summary.outcome != "finished":
            raise KeyboardInterrupt
        memory = device_memory_bytes(trainer.device)
        write_json(paths.result("train"), {"tokens_seen": trainer.tokens_seen, "peak_memory_bytes": memory})
        return f"{summary.total_steps:,} steps, {trainer.tokens_seen:,} tokens"

    def export(self, display: Display) -> str:
        """Write the averaged weights as a weights folder."""
        self._write_weights()
        return f"{self.paths.weights}"

    def evaluate_trained(self, display: Display) -> str:
        """Ask the exported model the same questions, then write its scores into its model card."""
        config = resolved(self.train_config)
        engine = load(self.paths.weights, device=config.device, dtype=config.dtype)
        scores = self._evaluate(engine, self.tasks, display, "after", weights_hash(self.paths.weights))
        write_json(self.paths.result("norms_after"), self.state_norms(engine))
        self._write_weights(scores)
        return f"{mean([score.strict for score in scores]):.1%} right"

    def report(self, display: Display) -> str:
        """Gather what the stages found out and write the page."""
        run = self.gather()
        write_json(self.paths.result("run"), run)
        write_report(run, self.paths.report)
        return f"{self.paths.report}"

    # ------------------------------------------------------------------------------------------------------- details --

    @cached_property
    def train_config(self) -> TrainConfig:
        """The settings of the training run."""
        preset, paths = self.preset, self.paths
        values = {
            "run": paths.run,
            "seed": self.seed,
            "model": preset.model,
            "data": {"sampled": paths.sampled("train"), "tokens_per_batch": preset.tokens_per_batch},
            "optimizer": {"lr": preset.learning_rate, "ema_decay": preset.ema_decay},
            "validation": {"sampled": paths.sampled("held_out"), "every_steps": preset.validate_every},
            "checkpoint": {"every_steps": preset.save_every},
        }
        return from_mapping(TrainConfig, values, "quickstart")

    @cached_property
    def tasks(self) -> list[Task]:
        """What the trained model is asked."""
        return self._tasks(self.preset.items_per_task)

    def _tasks(self, limit: int) -> list[Task]:
        """Each task under its own condition; those that show their steps under ``direct`` as well."""
        if self.preset.data == "procedural":
            own = find_tasks(list(CPU_WEIGHTS), limit=limit)
            stepwise = [task.name for task in own if task.condition == STEP_BY_STEP]
            return own + find_tasks([f"{name}:direct" for name in stepwise], limit=limit)
        files = sorted((self.paths.records / "held_out").rglob("*.jsonl"))
        return [held_out_task(file, limit=limit) for file in files]

    def _evaluate(
        self, engine: TextModel, tasks: Sequence[Task], display: Display, name: str, weights: str
    ) -> list[TaskScore]:
        results = evaluate_model(
            engine,
            tasks,
            self.paths.evaluation(name),
            identity={"weights": weights, "versions": versions()},
            batch=self.preset.items_at_once,
            on_progress=lambda done, total: display.progress(done, total, f"{done:,.0f} of {total:,.0f} questions"),
        )
        return [TaskScore(**score) for score in results["scores"]]

    def _write_weights(self, scores: Sequence[TaskScore] = ()) -> None:
        tasks = ", ".join(CPU_WEIGHTS) if self.preset.data == "procedural" else ", ".join(SOURCES)
        about = f"Made by the generators and sources of hrm-text itself ({tasks}); no text of the web is in it."
        export(
            self.paths.run,
            self.paths.weights,
            name=f"HRM-Text quickstart ({self.preset.name})",
            about_data=about,
            scores=scores,
        )

    @torch.no_grad()
    def state_norms(self, engine: TextModel) -> list[dict[str, Any]]:
        """Mean norm over tokens of what each module call writes, and of what it changes, on held-out prompts."""
        model, prompt_format = engine.module, engine.prompt_format
        first = [(task, given_questions(task)[0]) for task in self.tasks]
        prompts = [prompt_format.prefix_ids(task.asked_under(each), each.prompt) for task, each in first]
        lengths = torch.tensor([len(ids) for ids in prompts])
        device = model.lm_head.weight.device
        ids_T = torch.tensor([token for ids in prompts for token in ids], device=device)
        positions_T = torch.cat([torch.arange(length) for length in lengths.tolist()]).to(device)
        attention = packed_attention(Spans.of_samples(lengths, lengths), len(ids_T), device)
        names = call_names(plan(model.config))
        norms: list[dict[str, Any]] = []

        def observe(index: int, step: Step, before: torch.Tensor, after: torch.Tensor) -> None:
            norm, change = (x.float().norm(dim=-1).mean().item() for x in (after, after - before))
            norms.append({"call": names[index], "stack": step.stack, "norm": norm, "change": change})

        model.model(ids_T, positions_T, attention, observer=observe)
        return norms

    def gather(self) -> Run:
        """Everything the report shows, from the files the stages left."""
        paths, result = self.paths, lambda name: read_json(self.paths.result(name))
        trained, answers = result("train"), read_answered(paths.evaluation("after"))
        before, after = (read_json(paths.evaluation(name) / "results.json")["scores"] for name in ("before", "after"))
        before_scores = {score["task"]: score["strict"] for score in before}
        records = list(read_lines(paths.run / "metrics.jsonl"))
        config = resolved(self.train_config)
        stages = [{"name": name, **done} for name, done in self.progress.finished.items()]
        norms_before, norms_after = result("norms_before"), result("norms_after")
        run: dict[str, Any] = {
            "title": f"HRM-Text quickstart, preset {self.preset.name}",
            "seconds": sum(stage["seconds"] for stage in stages),
            "parameters": config.model.num_parameters,
            "tokens_seen": trained["tokens_seen"],
            "peak_memory_bytes": trained["peak_memory_bytes"],
            "config": {"preset": to_mapping(self.preset), "train": plain(config)},
            "versions": versions(),
            "machine": machine(config.device),
            "stages": stages,
            "steps": [record for record in records if record["kind"] == "step"],
            "validation": [record for record in records if record["kind"] == "validation"],
            "tasks": [
                {
                    "task": score["task"].partition(":")[0],
                    "condition": score["condition"],
                    "n": score["n"],
                    "before": before_scores[score["task"]],
                    "after": score["strict"],
                    "low": score["low"],
                    "high": score["high"],
                    "chance": score["chance"],
                    "example": next(each["prompt"] for each in answers if each["task"] == score["task"]),
                }
                for score in after
            ],
            "state_norms": [
                {
                    "call": late["call"],
                    "stack": late["stack"],
                    "norm_before_training": early["norm"],
                    "norm_after": late["norm"],
                    "change": late["change"],
                }
                for early, late in zip(norms_before, norms_after, strict=True)
            ],
            "samples": samples(answers),
            "direct_vs_cot": direct_vs_cot(answers, after),
            "files": [
                {"path": str(paths.weights), "what": "the model: weights, tokenizer, model card"},
                {"path": str(paths.run), "what": "checkpoints, metrics.jsonl, TensorBoard events"},
                {"path": str(paths.evaluation("after")), "what": "every question with its answer and its score"},
                {"path": str(paths.result("run")), "what": "the figures of this report as JSON"},
            ],
        }
        return run  # type: ignore[return-value]


def quickstart(out: Path, preset: str, seed: int, console: rich.console.Console) -> Run:
    """Run the quickstart and say on ``console`` what came out and what to type next."""
    stages = ("records", "tokenizer", "tokenise", "sample", "test before", "train", "export", "test after", "report")
    display = Display(stages, console)
    started = time.monotonic()
    job = Quickstart(find_preset(preset), out, seed)
    try:
        run = job.run(display)
    except KeyboardInterrupt:
        again = " ".join(["hrm-text", *sys.argv[1:]])
        told = f"\nInterrupted; what is finished is kept. To continue: {again}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
        raise
    print_outcome(run, job.paths, time.monotonic() - started, console)
    return run
