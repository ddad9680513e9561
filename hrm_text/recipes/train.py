"""A training run with everything that records it."""

from __future__ import annotations

import os

import rich.console

from hrm_text.contracts import UserError
from hrm_text.recipes.run_evaluation import RunEvaluator
from hrm_text.recipes.tuning_data import prepared
from hrm_text.train.config import TrainConfig
from hrm_text.train.console import Console
from hrm_text.train.execution import available_device
from hrm_text.train.hooks import Hook, JsonlMetrics, RunSummary, TensorBoard, WandB
from hrm_text.train.loop import Trainer
from hrm_text.train.world import World, joined


def train(settings: TrainConfig, console: rich.console.Console) -> RunSummary:
    """Train to the end or to an interruption: shown on ``console``, recorded in the run's folder.

    Every rank that torchrun started calls this; rank 0 alone shows and records.
    """
    with joined(available_device(settings.device), settings.distributed.timeout_seconds) as world:
        if not world.is_main:
            console = rich.console.Console(file=open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)
        if settings.data.records is not None:
            with world.main_first():
                settings = with_records_prepared(settings, console)
        evaluator = None
        if settings.evaluate.tasks:
            with console.status("reading the questions of the evaluation"):
                evaluator = evaluator_of(settings, world)
        # Seconds; the first plan of several bins compiles.
        with console.status("planning the epochs, drawing the weights"):
            trainer = Trainer(settings, hooks_of(settings, console, world), world, evaluator)
        return trainer.run()


def with_records_prepared(settings: TrainConfig, console: rich.console.Console) -> TrainConfig:
    """``tuning_data.prepared``, shown."""
    with console.status("reading the records") as status:
        return prepared(
            settings,
            lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
            lambda done, total: status.update(f"tokenising: {done / 1e6:.1f} of {total / 1e6:.1f} MB"),
        )


def evaluator_of(settings: TrainConfig, world: World) -> RunEvaluator | None:
    """What asks questions while the run trains, on rank 0. An error of its settings is one of all ranks."""
    evaluator, problem = None, None
    if world.is_main:
        try:
            evaluator = RunEvaluator(settings)
        except UserError as error:
            problem = str(error)
    if (problem := world.gathered(problem)[0]) is not None:
        raise UserError(problem)
    return evaluator


def hooks_of(settings: TrainConfig, console: rich.console.Console, world: World) -> list[Hook]:
    """What shows and records a run, on rank 0."""
    if not world.is_main:
        return []
    hooks: list[Hook] = [Console(console), JsonlMetrics(settings.run / "metrics.jsonl")]
    if settings.logging.tensorboard:
        hooks.append(TensorBoard(settings.run / "tensorboard"))
    if settings.logging.wandb_project is not None:
        hooks.append(WandB(settings.logging.wandb_project, settings.run.name))
    return hooks
