"""What commands say: notes to people on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console


def notes() -> Console:
    """Where people are told things: stderr, so that stdout holds results alone."""
    return Console(stderr=True)


def tell(text: str, style: str = "") -> None:
    """One line to people, as it is: a path may hold square brackets, and a line to copy must stay one line."""
    notes().print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """What does not stop a command, but should be known."""
    notes().print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Callable[[float, float], None]]:
    """An on_progress(done, total) that draws a bar with rate and time left."""
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.{0 if speed >= 10 else 1}f} {unit}/s")

    console = notes()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        Rate(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def tell_of_bad_records(bad: Any) -> None:
    """Nothing is lost silently: say what was left out and why."""
    if bad.total:
        tell(bad.summary(), style="yellow")


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(value, ensure_ascii=False))


def escape(text: str) -> str:
    """Text whose square brackets are no markup."""
    from rich.markup import escape as escaped

    return escaped(text)
