"""Hooks: everything a run reports while it trains. The loop calls them; none of them changes the run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hrm_text.contracts import UserError
from hrm_text.files import whole_file

Level = Literal["info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is known before the first step."""

    folder: Path
    start_step: int
    """Steps that a checkpoint had already finished; 0 for a fresh run."""
    total_steps: int
    parameters: int
    device: str
    config: Mapping[str, Any]
    """The resolved config, plain values."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. Losses and accuracies are over the supervised tokens of the whole global batch."""

    step: int
    """Steps finished, this one included: 1 to total_steps."""
    total_steps: int
    epoch: int
    loss: float
    """Cross-entropy per supervised token, in nats."""
    token_accuracy: float
    exact_accuracy: float
    """Share of responses whose every token is right."""
    lr: float
    k: int
    """Module calls that carried gradient."""
    tokens: int
    """Tokens of the step that belong to a sample; padding does not count."""
    supervised: int
    tokens_per_second: float
    mfu: float | None
    """0 to 1; None where the device's peak is not known."""
    memory_bytes: int
    """The most held so far."""
    skipped: int
    """Steps skipped so far for a loss or gradient that was not finite."""
    seconds: float
    """Wall time of the step."""


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """One pass over held-out records after ``step`` steps; the measures are those of StepRecord."""

    step: int
    weights: Literal["ema", "raw"]
    loss: float
    token_accuracy: float
    exact_accuracy: float
    samples: int
    supervised: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """What the weights made of some questions after ``step`` steps."""

    step: int
    weights: Literal["ema", "raw"]
    questions: int
    scores: Mapping[str, Mapping[str, float]]
    """By task and measure: strict, with the bounds low and high at 95 %; published, unreadable, truncated, all from 0
    to 1; mean_tokens of a response."""
    seconds: float
    share: float
    """Of the run's wall time so far, what evaluations have taken: this one, and those that were given up or failed."""


Record = StepRecord | ValidationRecord | EvaluationRecord
"""What becomes a line of metrics.jsonl, and points of curves."""


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A checkpoint that is whole: written while training went on."""

    step: int
    folder: Path
    stalled_seconds: float
    """How long training waited for it."""
    seconds: float
    """Until it was whole."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How the run ended."""

    step: int
    total_steps: int
    outcome: Literal["finished", "interrupted", "failed"]
    seconds: float
    checkpoint: Path | None
    """The last one written, from which the run continues."""
    stalled_seconds: float = 0.0
    """How long writing checkpoints has kept training from going on."""


class Hook:
    """What may be heard of a run. Every method does nothing until it is overridden."""

    def on_start(self, info: RunInfo) -> None: ...

    def on_step(self, record: StepRecord) -> None: ...

    def on_validation(self, record: ValidationRecord) -> None: ...

    def on_evaluation(self, record: EvaluationRecord) -> None: ...

    def on_checkpoint(self, record: CheckpointRecord) -> None: ...

    def on_message(self, level: Level, text: str) -> None: ...

    def on_end(self, summary: RunSummary) -> None:
        """Called however the run ends, as long as the process lives."""


class Hooks(Hook):
    """Several hooks as one, none of which can stop the run.

    What a hook raises becomes one warning to all of them; it goes on being called, since a full disk may empty again.
    Only KeyboardInterrupt and SystemExit, which are not the hook's, pass.
    """

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = list(hooks)
        self._failed: set[int] = set()

    def on_start(self, info: RunInfo) -> None:
        self._tell("on_start", info)

    def on_step(self, record: StepRecord) -> None:
        self._tell("on_step", record)

    def on_validation(self, record: ValidationRecord) -> None:
        self._tell("on_validation", record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._tell("on_evaluation", record)

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        self._tell("on_checkpoint", record)

    def on_message(self, level: Level, text: str) -> None:
        self._tell("on_message", level, text)

    def on_end(self, summary: RunSummary) -> None:
        self._tell("on_end", summary)

    def _tell(self, method: str, *arguments: Any) -> None:
        for index, hook in enumerate(self._hooks):
            try:
                getattr(hook, method)(*arguments)
            except Exception as error:  # the promise of this class
                if index not in self._failed:
                    self._failed.add(index)
                    self.on_message(
                        "warning",
                        f"{type(hook).__name__} failed in {method}: {error or type(error).__name__}; training goes on, "
                        "and what it records may be incomplete",
                    )


class JsonlMetrics(Hook):
    """One JSON object per line: ``kind`` "step", "validation" or "evaluation", and the fields of the record; flushed by
    the line.

    A number that is not finite is null. A resumed run first drops the records of steps after its checkpoint, and a line
    that a killed process left unfinished: the file reads as if the run had not stopped (validate before saving when
    both fall on one step, or the record of that validation is lost with the process).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.FileIO | None = None

    def on_start(self, info: RunInfo) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._forget_after(info.start_step)
        self._file = io.FileIO(self._path, "a")

    def on_step(self, record: StepRecord) -> None:
        self._write("step", record)

    def on_validation(self, record: ValidationRecord) -> None:
        self._write("validation", record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._write("evaluation", record)

    def on_end(self, summary: RunSummary) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, kind: str, record: Record) -> None:
        if self._file is None:  # it could not be opened, of which on_start has told
            return
        line = json.dumps({"kind": kind, **_values(record)}).encode() + b"\n"
        end = self._file.seek(0, io.SEEK_END)
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, "no space left on the device", str(self._path))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)  # no half line before the next one
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def _forget_after(self, step: int) -> None:
        with self._path.open("rb") as lines, whole_file(self._path) as beside, beside.open("wb") as kept:
            kept.writelines(line for line in lines if _step_of(line) <= step)


class TensorBoard(Hook):
    """Scalars for TensorBoard: "train/...", "validation_ema/...", "evaluation_ema/TASK/...", or "raw" for "ema"."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def on_start(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of imports

        # Records after the checkpoint are of the run that was cut off: TensorBoard hides them.
        purge_step = info.start_step + 1 if info.start_step else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)

    def on_step(self, record: StepRecord) -> None:
        self._add("train", record)

    def on_validation(self, record: ValidationRecord) -> None:
        self._add(f"validation_{record.weights}", record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._add(f"evaluation_{record.weights}", record)

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        if self._writer is not None:
            self._writer.flush()

    def on_end(self, summary: RunSummary) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, group: str, record: Record) -> None:
        if self._writer is not None:
            for name, value in _scalars(record).items():
                self._writer.add_scalar(f"{group}/{name}", value, record.step)


class WandB(Hook):
    """The same series on Weights & Biases. A resumed run continues the run whose id lies in the folder."""

    def __init__(self, project: str, name: str | None = None) -> None:
        """Raises UserError when the package is not there."""
        try:
            import wandb
        except ImportError:
            raise UserError(
                "logging to Weights & Biases needs the package wandb, which is not installed: "
                "pip install 'hrm-text[wandb]', or leave it out of the config"
            ) from None
        self._wandb = wandb
        self._project, self._name = project, name
        self._run: Any = None

    def on_start(self, info: RunInfo) -> None:
        id_file = info.folder / "wandb_id"
        if not (info.start_step and id_file.exists()):
            with whole_file(id_file) as beside:
                beside.write_text(uuid.uuid4().hex, encoding="utf-8")
        self._run = self._wandb.init(
            project=self._project,
            name=self._name or info.folder.name,
            id=id_file.read_text(encoding="utf-8"),
            dir=str(info.folder),
            config=dict(info.config),
            resume="allow",
        )

    def on_step(self, record: StepRecord) -> None:
        self._log("train", record)

    def on_validation(self, record: ValidationRecord) -> None:
        self._log(f"validation_{record.weights}", record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._log(f"evaluation_{record.weights}", record)

    def on_end(self, summary: RunSummary) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if summary.outcome == "finished" else 1)

    def _log(self, group: str, record: Record) -> None:
        if self._run is not None:
            values = {f"{group}/{name}": value for name, value in _scalars(record).items()}
            self._run.log(values, step=record.step)


def _values(record: Record) -> dict[str, Any]:
    """The fields of a record for JSON, which has no word for nan and inf."""

    def known(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: known(inner) for key, inner in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: known(value) for key, value in dataclasses.asdict(record).items()}


def _scalars(record: Record) -> dict[str, float]:
    """The numbers of a record that are worth a curve; those of a task by TASK/MEASURE."""
    values = _values(record)
    for task, measures in values.pop("scores", {}).items():
        values |= {f"{task}/{measure}": value for measure, value in measures.items()}
    axes = ("step", "total_steps", "questions")
    return {k: v for k, v in values.items() if isinstance(v, int | float) and k not in axes}


def _step_of(line: bytes) -> float:
    """The step of a line of the metrics file; infinity when the line is torn or is none of ours."""
    if not line.endswith(b"\n"):
        return math.inf
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
