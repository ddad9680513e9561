"""The hook that shows a run in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable

import rich.console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hrm_text.train.hooks import (
    CheckpointRecord,
    EvaluationRecord,
    Hook,
    Level,
    RunInfo,
    RunSummary,
    StepRecord,
    ValidationRecord,
)

STYLES: dict[Level, str] = {"info": "", "warning": "yellow", "error": "bold red"}


class Console(Hook):
    """A live bar above the figures of the last step on a terminal; elsewhere those figures, every few seconds."""

    def __init__(
        self,
        console: rich.console.Console | None = None,
        seconds_per_line: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or rich.console.Console(stderr=True)
        self._animated = self._console.is_terminal and not self._console.is_dumb_terminal
        self._seconds_per_line = seconds_per_line
        self._clock = clock
        self._live: Live | None = None
        self._record: StepRecord | None = None
        self._start_step = 0
        self._started = self._last_line = clock()

    def on_start(self, info: RunInfo) -> None:
        self._start_step = info.start_step
        self._started = self._last_line = self._clock()
        steps = f"steps {info.start_step + 1:,} to {info.total_steps:,}"
        self._print(f"training {info.parameters:,} parameters on {info.device}, {steps}, in {info.folder}")
        if self._animated:
            # Drawn a few times a second from the last record: a step costs no drawing, however short it is.
            self._live = Live(get_renderable=self._bar, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def on_step(self, record: StepRecord) -> None:
        now = self._clock()
        if self._record is None:
            self._print(f"first step after {now - self._started:.1f} s")
        self._record = record
        due = now - self._last_line >= self._seconds_per_line and record.step < record.total_steps
        if due and not self._animated:
            self._last_line = now
            self._print_step(record)

    def on_validation(self, record: ValidationRecord) -> None:
        self._print(
            f"step {record.step:,}: validation loss {record.loss:.4f}, tokens right {record.token_accuracy:.1%}, "
            f"whole responses {record.exact_accuracy:.1%} of {record.samples:,} ({record.weights} weights)"
        )

    def on_evaluation(self, record: EvaluationRecord) -> None:
        strict = {task: measures["strict"] for task, measures in record.scores.items()}
        scores = ", ".join(f"{task} {score:.1%}" for task, score in strict.items())
        if len(strict) > 1:
            scores = f"mean {sum(strict.values()) / len(strict):.1%} ({scores})"
        self._print(
            f"step {record.step:,}: evaluation {scores}; {record.questions:,} questions in {record.seconds:.1f} s, "
            f"{record.share:.1%} of the run so far ({record.weights} weights)"
        )

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        waited = f", which held training up for {record.stalled_seconds:.1f} s" if record.stalled_seconds >= 0.1 else ""
        self._print(f"saved {record.folder} in {record.seconds:.1f} s{waited}")

    def on_message(self, level: Level, text: str) -> None:
        self._print(text if level == "info" else f"{level}: {text}", STYLES[level])

    def on_end(self, summary: RunSummary) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._record is not None:
            self._print_step(self._record)
        saved = f"; continue from {summary.checkpoint}" if summary.checkpoint and summary.outcome != "finished" else ""
        steps = f"{summary.step:,} of {summary.total_steps:,} steps"
        share = summary.stalled_seconds / max(summary.seconds, 1e-9)
        stalled = f", {share:.1%} of it held up by checkpoints" if share >= 0.001 else ""
        self._print(f"{summary.outcome} after {steps} in {duration(summary.seconds)}{stalled}{saved}")

    def _print(self, text: str, style: str = "") -> None:
        # No markup: a path may hold square brackets. No wrapping: a line of a log stays one line.
        self._console.print(Text(text, style=style), soft_wrap=True, highlight=False)

    def _print_step(self, record: StepRecord) -> None:
        self._print(f"step {record.step:,}/{record.total_steps:,}  {self._describe(record)}")

    def _describe(self, record: StepRecord) -> str:
        done = record.step - self._start_step
        left = (self._clock() - self._started) / max(done, 1) * (record.total_steps - record.step)
        mfu = f"  mfu {record.mfu:.1%}" if record.mfu is not None else ""
        skipped = f"  skipped {record.skipped}" if record.skipped else ""
        return (
            f"epoch {record.epoch}  loss {record.loss:.4f}  exact {record.exact_accuracy:.1%}  "
            f"{record.tokens_per_second:,.0f} tokens/s{mfu}  K {record.k}  lr {record.lr:.2e}  "
            f"{record.memory_bytes / 2**30:.1f} GiB{skipped}  ETA {duration(left)}"
        )

    def _bar(self) -> Table:
        table = Table.grid(padding=(0, 1))
        if self._record is None:
            table.add_row(Text("first step ..."))
            return table
        step, total = self._record.step, self._record.total_steps
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total, step, width=40), Text(f"{step:,}/{total:,} {step / total:.0%}"))
        table.add_row(bar)
        table.add_row(Text(self._describe(self._record)))
        return table


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
