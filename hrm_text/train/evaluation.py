"""Evaluation while a run trains: when it happens, what it may cost, and that it neither changes nor ends the run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from hrm_text.train import checkpoint
from hrm_text.train.config import EvaluateConfig
from hrm_text.train.hooks import EvaluationRecord, Hook
from hrm_text.train.step import TrainingStep
from hrm_text.train.watchdog import Watchdog
from hrm_text.train.world import World

Scores = Mapping[str, Mapping[str, float]]
"""By task and measure, as in ``EvaluationRecord``."""

BEGINS_WITH, ENDS_AT = 1.5, 1.2
"""An evaluation begins when there is room for one that takes the first times as long as the last, and is given up when
what it has taken, times the second, is more than the room: some work comes after the last answer."""


class GivenUp(Exception):
    """An evaluation has to end before it is done; the reason in words."""


class Evaluator(Protocol):
    """Asks questions of weights. Whoever starts the run hands one in: training knows neither engines nor tasks."""

    @property
    def description(self) -> str:
        """What is asked, and the memory that it takes, in a sentence."""
        ...

    @property
    def questions(self) -> int:
        """How many are asked."""
        ...

    def __call__(self, step: int, weights: Mapping[str, Tensor], progress: Callable[[float], None]) -> Scores:
        """The scores of the weights after ``step`` steps.

        Args:
            step: steps finished.
            weights: parameters and buffers by name, where and in which dtype the run computes. They may be the run's
                own: to be read, and not to be kept.
            progress: called with the share that is done, every second or more often; it raises ``GivenUp``, which is to
                pass.
        """
        ...


class Evaluations:
    """The evaluations of a run. Every rank has them, and rank 0 asks while the others wait.

    Time is rank 0's. It is counted over all processes that a run was continued by: a checkpoint keeps the counts.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        evaluator: Evaluator | None,
        training: TrainingStep,
        world: World,
        hooks: Hook,
        watchdog: Watchdog | None = None,
    ) -> None:
        """``evaluator``: on rank 0, if ``config`` names tasks."""
        if config.tasks and evaluator is None and world.is_main:
            raise ValueError("evaluate.tasks need an evaluator: hand one to the Trainer, or use hrm_text.recipes.train")
        self.config, self.evaluator, self.training = config, evaluator, training
        self.world, self.hooks, self.watchdog = world, hooks, watchdog
        self.spent = 0.0
        """Seconds that evaluations have taken."""
        self.predicted: float | None = None
        """Seconds of the next one; None before the first."""
        self.owed = False
        """Whether the last one was given up because the run was to stop."""
        self._before = 0.0
        """Seconds of the run in earlier processes."""
        self._began = time.monotonic()
        self._told_of_postponing = False

    def begin(self) -> None:
        """The run's time begins."""
        self._began = time.monotonic()
        if self.evaluator is not None:
            self.hooks.on_message("info", self.evaluator.description)

    def due(self, step: int, total_steps: int) -> bool:
        """Whether there may be one after this step; the same on all ranks."""
        return bool(self.config.tasks) and (step == total_steps or step % self.config.every_steps == 0)

    def run(self, step: int, is_last: bool, is_stopping: Callable[[], bool]) -> None:
        """Evaluate after ``step`` steps, if there is time for it. All ranks call it.

        is_last: whether there will be no other. is_stopping: whether the run is to stop; an evaluation is then given
        up, and made up for when the run is continued.
        """
        self.owed = False
        # The others wait for as long as rank 0 asks, and no rank hangs by that.
        with self.watchdog.paused() if self.watchdog is not None else contextlib.nullcontext():
            if not self.world.gathered(self._is_affordable())[0]:
                self._tell_of_postponing(is_last)
                return
            started, room = time.monotonic(), self._room()
            weights, problem = self._weights()
            if self.evaluator is not None:
                self._ask(self.evaluator, step, weights, problem, started, room, is_stopping)
            del weights
            self.world.barrier()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON."""
        return {"spent": self.spent, "seconds": self._seconds, "predicted": self.predicted, "owed": self.owed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state`` gave."""
        self.spent, self._before = state["spent"], state["seconds"]
        self.predicted, self.owed = state["predicted"], state["owed"] and bool(self.config.tasks)

    # --------------------------------------------------------------------------------------------------------- time --

    @property
    def _seconds(self) -> float:
        """Of the run so far."""
        return self._before + time.monotonic() - self._began

    def _room(self) -> float:
        """Seconds s that an evaluation may take now: spent + s is at most the share of the run's seconds + s."""
        share = self.config.most_share
        return math.inf if share == 1 else (share * self._seconds - self.spent) / (1 - share)

    def _is_affordable(self) -> bool:
        room = self._room()
        return room > 0 if self.predicted is None else BEGINS_WITH * self.predicted <= room

    def _tell_of_postponing(self, is_last: bool) -> None:
        """Once, as evaluations that come too often are late from then on; and where there is no later one."""
        if not self.world.is_main or (self._told_of_postponing and not is_last):
            return
        self._told_of_postponing = True
        what = "there is no evaluation after the last step: it" if is_last else "evaluation is postponed until it"
        fits = "does not fit" if is_last else "fits"
        takes = "" if self.predicted is None else f", and one takes about {self.predicted:.1f} s"
        self.hooks.on_message(
            "info",
            f"{what} {fits} into {self.config.most_share:.1%} of the run's time, which leaves "
            f"{max(self._room(), 0):.1f} s now{takes}. A smaller evaluate.limit lets it come more often, or a larger "
            "evaluate.most_share",
        )

    # ------------------------------------------------------------------------------------------------------- asking --

    def _weights(self) -> tuple[dict[str, Tensor], Exception | None]:
        """What rank 0 asks, and why it cannot have it. All ranks go to the end: one that does not stops the others."""
        weights: dict[str, Tensor] = {}
        problem: Exception | None = None
        for name, tensor in self.training.averaged_tensors():
            if not self.world.is_main or problem is not None:
                continue
            try:
                weights[name] = tensor.to(self.training.device)
            except Exception as error:  # of memory, say
                weights, problem = {}, error
        return weights, problem

    def _ask(
        self,
        evaluator: Evaluator,
        step: int,
        weights: Mapping[str, Tensor],
        problem: Exception | None,
        started: float,
        room: float,
        is_stopping: Callable[[], bool],
    ) -> None:
        """Ask, and tell of it. Whatever goes wrong is told as well, and the run goes on."""
        done, out_of_time = 0.0, False

        def progress(share: float) -> None:
            nonlocal done, out_of_time
            done = share
            if is_stopping():
                raise GivenUp("the run is to stop")
            if ENDS_AT * (time.monotonic() - started) > room:
                out_of_time = True
                raise GivenUp(f"it would take more than {self.config.most_share:.1%} of the run's time")

        scores: Scores | None = None
        rng = checkpoint.rng_state()
        try:
            if problem is not None:
                raise problem
            scores = evaluator(step, weights, progress)
        except GivenUp as reason:
            self.owed = is_stopping()
            self.hooks.on_message("info", f"evaluation after step {step:,} was given up: {reason}")
        except Exception as error:  # the promise of this module
            what = str(error).strip() or type(error).__name__
            self.hooks.on_message("warning", f"no evaluation after step {step:,}: {what}; training goes on")
        finally:
            checkpoint.restore_rng(rng)
        seconds = time.monotonic() - started
        self.spent += seconds
        if scores is not None:
            self.predicted = seconds
            share = self.spent / max(self._seconds, self.spent)
            record = EvaluationRecord(step, "ema", evaluator.questions, scores, seconds, share)
            self.hooks.on_evaluation(record)
        elif out_of_time:
            self.predicted = seconds / done if done else 2 * seconds
