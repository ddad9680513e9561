"""A training run with everything that records it."""

from __future__ import annotations

import rich.console

from hrm_text.train.config import TrainConfig
from hrm_text.train.console import Console
from hrm_text.train.hooks import Hook, JsonlMetrics, RunSummary, TensorBoard, WandB
from hrm_text.train.loop import Trainer


def train(settings: TrainConfig, console: rich.console.Console) -> RunSummary:
    """Train to the end or to an interruption: shown on ``console``, recorded in the run's folder."""
    hooks: list[Hook] = [Console(console), JsonlMetrics(settings.run / "metrics.jsonl")]
    if settings.logging.tensorboard:
        hooks.append(TensorBoard(settings.run / "tensorboard"))
    if settings.logging.wandb_project is not None:
        hooks.append(WandB(settings.logging.wandb_project, settings.run.name))
    with console.status("planning the epochs, drawing the weights"):  # seconds; the first plan of several bins compiles
        trainer = Trainer(settings, hooks)
    return trainer.run()
