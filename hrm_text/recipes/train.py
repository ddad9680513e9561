"""A training run with everything that records it."""

from __future__ import annotations

import os

import rich.console

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
        # Seconds; the first plan of several bins compiles.
        with console.status("planning the epochs, drawing the weights"):
            trainer = Trainer(settings, hooks_of(settings, console, world), world)
        return trainer.run()


def with_records_prepared(settings: TrainConfig, console: rich.console.Console) -> TrainConfig:
    """``tuning_data.prepared``, shown."""
    with console.status("reading the records") as status:
        return prepared(
            settings,
            lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
            lambda done, total: status.update(f"tokenising: {done / 1e6:.1f} of {total / 1e6:.1f} MB"),
        )


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
