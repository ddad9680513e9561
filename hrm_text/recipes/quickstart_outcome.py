"""What comes out of a quickstart: rows of its report from the files of its stages, and the last words on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import rich.console
import rich.text

from hrm_text.recipes.quickstart_paths import Paths
from hrm_text.recipes.report import Run, headline

SAMPLES_SHOWN = 2
"""Answers of each task that the report shows."""


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    with path.open("rb") as lines:
        for line in lines:
            yield orjson.loads(line)


def read_answered(folder: Path) -> list[dict[str, Any]]:
    """The answers of a finished evaluation, one to a question, each with the fields of its question."""
    asked, answered = (list(read_lines(folder / f"{name}.jsonl")) for name in ("questions", "answers"))
    return [
        question | answer | {"condition": question["asked_under"], "ok": answer["strict"] == 1}
        for question, answer in zip(asked, answered, strict=True)
    ]


def samples(answered: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first few answers of every task, right or wrong as they came."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for each in answered:
        of_task = shown.setdefault(each["task"], [])
        if len(of_task) < SAMPLES_SHOWN:
            of_task.append(
                {
                    "task": each["task"].partition(":")[0],
                    "condition": each["condition"],
                    "prompt": each["prompt"],
                    "response": each["text"],
                    "expected": each["answer"],
                    "ok": each["ok"],
                }
            )
    return [sample for of_task in shown.values() for sample in of_task]


def direct_vs_cot(answered: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One question of every task that was asked both ways, with the task's accuracy each way."""
    accuracy = {score["task"]: score["strict"] for score in scores}
    by_task: dict[str, dict[str, Mapping[str, Any]]] = {}
    for each in answered:
        by_task.setdefault(each["task"], {})[each["prompt"]] = each
    pairs = []
    for name in [name for name in by_task if name.endswith(":direct")]:
        stepwise = name.partition(":")[0]
        prompt = next(prompt for prompt in by_task[name] if prompt in by_task[stepwise])
        direct, cot = by_task[name][prompt], by_task[stepwise][prompt]
        pairs.append(
            {
                "prompt": prompt,
                "expected": direct["answer"],
                "direct": {"response": direct["text"], "ok": direct["ok"]},
                "cot": {"response": cot["text"], "ok": cot["ok"]},
                "accuracies": {"direct": accuracy[name], "cot": accuracy[stepwise]},
            }
        )
    return pairs


def print_outcome(run: Run, paths: Paths, seconds: float, console: rich.console.Console) -> None:
    """The result as a table, one question asked both ways, and what to type next."""
    from rich.table import Table

    table = Table(title="Held-out questions answered right", title_justify="left", header_style="bold")
    for column, justify in (("task", "left"), ("condition", "left"), ("before", "right"), ("after", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("95 % interval", justify="right")
    table.add_column("chance", justify="right")
    for task in run["tasks"]:
        table.add_row(
            task["task"],
            task["condition"],
            f"{task['before']:.1%}",
            f"[bold]{task['after']:.1%}[/]",
            f"{task['low']:.0%} to {task['high']:.0%}",
            f"{task['chance']:.0%}",
        )
    console.print(table)
    top = headline(run["tasks"])
    assert top is not None
    console.print(
        f"mean of {top['num_tasks']} rows: {top['mean_before']:.1%} before, [bold]{top['mean_after']:.1%}[/] after; "
        f"{top['num_above_95']} above 95 %",
        highlight=False,
    )
    for pair in run["direct_vs_cot"][:2]:
        console.print(rich.text.Text(f"\n{pair['prompt']}", style="bold"))
        for condition in ("direct", "cot"):
            answer = pair[condition]
            mark = "[green]right[/]" if answer["ok"] else "[red]wrong[/]"
            console.print(f"  {condition:6} {mark}  ", end="", highlight=False)
            console.print(rich.text.Text(answer["response"]))
    console.print(
        f"\n{seconds:.0f} s. Wrote {paths.report} and {paths.weights}. Next:\n"
        f"  hrm-text generate {paths.weights} --condition cot --prompt '57 + 38'\n"
        f"  hrm-text eval {paths.weights} --tasks quickstart\n"
        f"  tensorboard --logdir {paths.run}/tensorboard",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
