"""The report of a run: one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import yaml

from hrm_text.files import whole_file
from hrm_text.recipes import charts
from hrm_text.recipes.pages import render_page


class Stage(TypedDict):
    """One stage of the workflow."""

    name: str
    seconds: float
    detail: str


class TrainStep(TypedDict):
    """One optimiser step; accuracies are shares of 1 over the supervised tokens and whole responses of its batch."""

    step: int
    loss: float | None
    token_accuracy: NotRequired[float | None]
    exact_accuracy: NotRequired[float | None]
    lr: float
    k: int
    tokens_per_second: NotRequired[float | None]


class ValidationPoint(TypedDict):
    """The held-out records, scored at a step."""

    step: int
    loss: float
    token_accuracy: NotRequired[float | None]
    exact_accuracy: NotRequired[float | None]


class TaskResult(TypedDict):
    """Exact match on the n held-out instances of a task, as shares of 1."""

    task: str
    condition: str
    n: int
    before: float
    """Of the untrained model."""
    after: float
    low: float
    """Lower end of the 95 % interval of ``after``."""
    high: float
    chance: float
    """What the best constant or random guess would score."""
    example: NotRequired[str]
    """One prompt of the task."""


class StateNorm(TypedDict):
    """One module call of the forward pass, in the order of the plan; norms are means over the tokens of a batch."""

    call: str
    """L1, L2, L3, H1, ..."""
    stack: str
    """L or H; any other name of a stack is drawn as L is."""
    norm_before_training: float | None
    """Norm of the state that the call writes, untrained model."""
    norm_after: float | None
    """The same, trained model."""
    change: float | None
    """Norm of (state after the call - the same state before it), trained model."""


class Sample(TypedDict):
    """A held-out prompt and what the trained model answered."""

    task: str
    condition: str
    prompt: str
    response: str
    expected: str
    ok: bool


class Answer(TypedDict):
    """One answer of a pair."""

    response: str
    ok: bool


class Accuracies(TypedDict):
    """Exact match of a whole task under each condition, as shares of 1."""

    direct: float
    cot: float


class DirectVsCot(TypedDict):
    """The same prompt under the direct and under the step-by-step condition."""

    prompt: str
    expected: NotRequired[str]
    direct: Answer
    cot: Answer
    accuracies: NotRequired[Accuracies]
    """Of the task that the prompt belongs to."""


class WrittenFile(TypedDict):
    """Something that the run left on the disk."""

    path: str
    what: str


class Run(TypedDict):
    """Everything the report shows; plain values, so that it can be kept as JSON. What is missing or empty is left out.

    Mean accuracy, the count of tasks above 95 % and the median speed are derived, here and nowhere else.
    """

    title: NotRequired[str]
    seconds: NotRequired[float]
    """Wall clock of the whole run."""
    parameters: NotRequired[int]
    tokens_seen: NotRequired[int]
    """Tokens that training went through, prefix and response."""
    peak_memory_bytes: NotRequired[int]
    config: NotRequired[dict[str, Any]]
    """Resolved, nested."""
    versions: NotRequired[dict[str, str]]
    machine: NotRequired[dict[str, str]]
    stages: NotRequired[list[Stage]]
    steps: NotRequired[list[TrainStep]]
    validation: NotRequired[list[ValidationPoint]]
    tasks: NotRequired[list[TaskResult]]
    state_norms: NotRequired[list[StateNorm]]
    samples: NotRequired[list[Sample]]
    direct_vs_cot: NotRequired[list[DirectVsCot]]
    files: NotRequired[list[WrittenFile]]


class Headline(TypedDict):
    """The figures that a reader looks for first; shares of 1."""

    mean_before: float
    mean_after: float
    num_tasks: int
    num_above_95: int


def headline(tasks: Sequence[TaskResult]) -> Headline | None:
    """The unweighted means over the tasks; None without tasks."""
    if not tasks:
        return None
    return Headline(
        mean_before=statistics.fmean(task["before"] for task in tasks),
        mean_after=statistics.fmean(task["after"] for task in tasks),
        num_tasks=len(tasks),
        num_above_95=sum(task["after"] > 0.95 for task in tasks),
    )


def write_report(run: Run, out: Path) -> Path:
    """Write the report to the file ``out``, whole or not at all."""
    page = render(run)
    with whole_file(out) as beside:
        # A model may emit half a surrogate pair; the page shows a question mark for it.
        beside.write_text(page, encoding="utf-8", errors="replace")
    return out


def render(run: Run) -> str:
    """The report as HTML text. Every string of ``run`` is escaped; only our own charts enter as markup."""
    from markupsafe import Markup

    steps, validation, tasks = run.get("steps", []), run.get("validation", []), run.get("tasks", [])
    norms, stages = run.get("state_norms", []), run.get("stages", [])
    speeds = [speed for step in steps if (speed := step.get("tokens_per_second"))]
    config = run.get("config")
    return render_page(
        "report.html.j2",
        title=run.get("title", "HRM-Text"),
        headline=headline(tasks),
        seconds=run.get("seconds"),
        parameters=run.get("parameters"),
        tokens_seen=run.get("tokens_seen"),
        peak_memory_bytes=run.get("peak_memory_bytes"),
        tokens_per_second=statistics.median(speeds) if speeds else None,
        pairs=run.get("direct_vs_cot", []),
        tasks=tasks,
        steps=steps,
        validation=validation,
        samples=run.get("samples", []),
        norms=norms,
        stages=stages,
        files=run.get("files", []),
        machine=run.get("machine", {}),
        versions=run.get("versions", {}),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=math.inf) if config else None,
        accuracy_chart=Markup(charts.accuracy_chart(tasks)) if tasks else None,
        learning_chart=Markup(charts.learning_chart(steps, validation)) if steps else None,
        schedule_chart=Markup(charts.schedule_chart(steps)) if steps else None,
        norms_chart=Markup(charts.norms_chart(norms)) if norms else None,
        stages_chart=Markup(charts.stages_chart(stages)) if stages else None,
    )
