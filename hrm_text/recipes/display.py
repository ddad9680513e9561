"""What a person sees while a workflow runs: its stages, and the figures of the one under way."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import rich.console
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hrm_text.train.hooks import CheckpointRecord, Hook, Level, RunInfo, StepRecord, ValidationRecord

SPARKS = "▁▂▃▄▅▆▇█"


class Display(Hook):
    """Stages of a workflow, live on a terminal; elsewhere a line when a stage ends and one every few seconds between.

    As a training hook it shows loss, accuracy, tokens/s, K and the time left.
    """

    def __init__(self, stages: Sequence[str], console: rich.console.Console, seconds_per_line: float = 15.0) -> None:
        self.console = console
        self.animated = console.is_terminal and not console.is_dumb_terminal
        self.seconds_per_line = seconds_per_line
        self.started = time.monotonic()
        self.ended: dict[str, tuple[float, str]] = {}
        self.stages = list(stages)
        self.now: str | None = None
        self.now_started = 0.0
        self.now_detail = ""
        self.share: float | None = None
        self.share_at_start = 0.0
        """Where a stage that was interrupted took up again."""
        self.losses: list[float] = []
        self.validation: ValidationRecord | None = None
        self._last_line = 0.0
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the display while the workflow runs; what it showed last stays on the screen."""
        if not self.animated:
            yield
            return
        with Live(get_renderable=self.render, console=self.console, refresh_per_second=4) as self._live:
            yield

    def begin(self, stage: str) -> None:
        """A stage starts."""
        self.now, self.now_started, self.now_detail, self.share = stage, time.monotonic(), "", None
        self.share_at_start = 0.0
        self._last_line = time.monotonic()

    def progress(self, done: float, total: float, detail: str = "") -> None:
        """How far the stage has come."""
        self.share = done / total if total else None
        self.now_detail = detail or f"{done:,.0f} of {total:,.0f}"
        if not self.animated and time.monotonic() - self._last_line >= self.seconds_per_line:
            self._last_line = time.monotonic()
            self._print(f"  {self.now}: {self.now_detail}{self._eta()}")

    def end(self, stage: str, seconds: float, detail: str, reused: bool = False) -> None:
        """A stage is over, or was found finished by an earlier run."""
        self.ended[stage] = (seconds, f"{detail} (done before)" if reused else detail)
        self.now = None
        if not self.animated:
            self._print(f"{stage}: {self.ended[stage][1]} [{seconds:.1f} s]")

    def note(self, text: str, style: str = "") -> None:
        """A line that stays above the live display."""
        self._print(text, style)

    # -------------------------------------------------------------------------------------------- as a training hook --

    def on_start(self, info: RunInfo) -> None:
        """Say where training continues, if it does."""
        self.share_at_start = info.start_step / info.total_steps
        if info.start_step:
            self.note(f"training continues after step {info.start_step:,} of {info.total_steps:,}")

    def on_step(self, record: StepRecord) -> None:
        """Show the figures of a step."""
        self.losses.append(record.loss)
        held_out = f"  held-out exact {self.validation.exact_accuracy:.0%}" if self.validation else ""
        self.progress(
            record.step,
            record.total_steps,
            f"step {record.step:,}/{record.total_steps:,}  K {record.k}  loss {record.loss:.3f}  "
            f"exact {record.exact_accuracy:.0%}{held_out}  {record.tokens_per_second:,.0f} tokens/s",
        )

    def on_validation(self, record: ValidationRecord) -> None:
        """Remember it for the line of the next steps."""
        self.validation = record

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        """Nothing to show: it happens several times a minute."""

    def on_message(self, level: Level, text: str) -> None:
        """Warnings stay on the screen."""
        self.note(text, "yellow" if level == "warning" else "")

    # ------------------------------------------------------------------------------------------------------- drawing --

    def render(self) -> RenderableType:
        """The stages as a table, and the figures of the one under way."""
        table = Table.grid(padding=(0, 2))
        for stage in self.stages:
            if stage in self.ended:
                seconds, detail = self.ended[stage]
                table.add_row("[green]✓[/]", stage, f"[dim]{seconds:6.1f} s[/]", Text(detail, style="dim"))
            elif stage == self.now:
                seconds = time.monotonic() - self.now_started
                table.add_row("[cyan]▸[/]", f"[bold]{stage}[/]", f"{seconds:6.1f} s", Text(self.now_detail))
            else:
                table.add_row("[dim]·[/]", f"[dim]{stage}[/]", "", "")
        parts: list[RenderableType] = [table]
        if self.now is not None and self.share is not None:
            bar = Table.grid(padding=(0, 2))
            bar.add_row("", ProgressBar(total=1.0, completed=self.share, width=40), Text(self._eta().strip()))
            parts.append(bar)
        if self.now is not None and len(self.losses) > 1 and self.share is not None and self.now == "train":
            parts.append(Text(f"    loss {sparkline(self.losses)}", style="cyan"))
        return Group(*parts)

    def _eta(self) -> str:
        if not self.share:
            return ""
        done = self.share - self.share_at_start
        if done <= 0:
            return ""
        left = (time.monotonic() - self.now_started) * (1 - self.share) / done
        minutes, seconds = divmod(round(left), 60)
        return f"  {self.share:.0%}, {minutes}:{seconds:02d} left"

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True, highlight=False)


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """The values as a line of blocks, averaged into ``width`` columns, the largest as the tallest.

    Values that are not finite do not count; a column of nothing else is blank.
    """
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    finite = [[value for value in values[a:b] if math.isfinite(value)] for a, b in itertools.pairwise(edges)]
    means = [sum(column) / len(column) if column else math.nan for column in finite]
    low, high = (pick((mean for mean in means if math.isfinite(mean)), default=0.0) for pick in (min, max))
    heights = [(mean - low) / ((high - low) or 1.0) * (len(SPARKS) - 1) for mean in means]
    return "".join(SPARKS[round(height)] if math.isfinite(height) else " " for height in heights)
