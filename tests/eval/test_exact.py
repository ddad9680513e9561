from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hrm_text.contracts import UserError
from hrm_text.eval.answers import Answer, Asked
from hrm_text.eval.exact import OWN_CONDITION, Problem, exact_task, given_questions
from hrm_text.eval.metrics import wilson_interval
from hrm_text.eval.runs import plan_run, run
from hrm_text.eval.task import Dataset, Row, Task
from hrm_text.eval.tasks import find_tasks


def no_rows(dataset: Dataset, /) -> Sequence[Row]:
    raise AssertionError(f"{dataset} is read")


no_rows.provenance = no_rows  # type: ignore[attr-defined]


@dataclass
class KnowsSome:
    """Answers from a table, "?" where it has nothing, and remembers what it was asked."""

    answers: Mapping[tuple[str, str], str]
    context: int = 1000
    asked: list[Asked] = field(default_factory=list)

    def num_tokens(self, condition: str, prompt: str) -> int:
        return len(prompt)

    def ask(self, asked: Sequence[Asked], told: Callable[[int, Answer], None]) -> None:
        self.asked += asked
        for index, each in enumerate(asked):
            text = self.answers.get((each.condition, each.prompt), "?")
            told(index, Answer(text, len(text), "stop"))

    def speed(self) -> dict[str, float]:
        return {}


def problems(condition: str, **answers: str) -> list[Problem]:
    return [Problem(condition, prompt, answer) for prompt, answer in answers.items()]


def scored(tasks: Sequence[Task], answerer: KnowsSome, out: Path) -> tuple[list[Any], list[Any]]:
    """The scores, and the lines of the answers."""
    results = run(plan_run(tasks, no_rows, answerer, identity={}), answerer, out)  # type: ignore[arg-type]
    return results["scores"], [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def test_scores_and_answers_follow_tasks_and_problems(tmp_path: Path) -> None:
    knows = KnowsSome({("direct", "a"): "1", ("direct", "b"): " 2\n", ("direct", "c"): "7", ("cot", "d"): "4"})
    mixed = problems("direct", a="1", b="2", c="3") + problems("cot", d="4")
    letters = exact_task("letters", mixed, 8, chance=0.1)
    others = exact_task("others", problems("direct", e="5", a="wrong"), 9, chance=0.5)

    (first, second), answers = scored([letters, others], knows, tmp_path / "run")

    assert (first["task"], first["n"], first["strict"], first["chance"]) == ("letters", 4, 0.75, 0.1)
    assert (first["low"], first["high"]) == wilson_interval(3, 4)
    assert (first["condition"], second["condition"]) == (OWN_CONDITION, "direct")
    assert (second["task"], second["n"], second["strict"], second["chance"]) == ("others", 2, 0.0, 0.5)
    assert [(each["task"], each["text"], each["got"], each["strict"]) for each in answers] == [
        ("letters", "1", "1", 1),
        ("letters", " 2\n", "2", 1),
        ("letters", "7", "7", 0),
        ("letters", "4", "4", 1),
        ("others", "?", "?", 0),
        ("others", "1", "1", 0),
    ]
    assert [(each.condition, each.prompt, each.max_new_tokens, each.temperature) for each in knows.asked] == [
        ("direct", "a", 8, 0.0), ("direct", "b", 8, 0.0), ("direct", "c", 8, 0.0), ("cot", "d", 8, 0.0),
        ("direct", "e", 9, 0.0), ("direct", "a", 9, 0.0),
    ]  # fmt: skip


def test_the_answer_is_looked_for_in_the_response_by_the_problems_own_rule(tmp_path: Path) -> None:
    knows = KnowsSome({("cot", "3 + 4"): "3, 4, so = 7", ("cot", "2 + 2"): "2, 2, so = 5"})
    pairs = (("3 + 4", "7"), ("2 + 2", "4"))
    last = [Problem("cot", prompt, answer, lambda response: response[-1:]) for prompt, answer in pairs]
    _, (first, second) = scored([exact_task("sums", last, 16, chance=0)], knows, tmp_path / "run")
    assert (first["text"], first["got"], first["strict"]) == ("3, 4, so = 7", "7", 1)
    assert (second["got"], second["strict"], second["readable"]) == ("5", 0, True)


def test_a_condition_that_is_named_is_that_of_all() -> None:
    mixed = problems("direct", a="1") + problems("cot", b="2")
    own, named = exact_task("own", mixed, 8, 0), exact_task("named", mixed, 8, 0, condition="noisy")
    assert [own.asked_under(each) for each in given_questions(own)] == ["direct", "cot"]
    assert [named.asked_under(each) for each in given_questions(named)] == ["noisy", "noisy"]


def test_an_empty_task_and_a_benchmark_without_rows_are_refused() -> None:
    with pytest.raises(UserError, match="task 'empty' has no items"):
        plan_run([exact_task("empty", [], 8, 0)], no_rows, KnowsSome({}), identity={})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="task 'gsm8k' reads a data set"):
        given_questions(find_tasks(["gsm8k"])[0])


def test_an_answerer_that_loses_an_answer_is_a_bug(tmp_path: Path) -> None:
    class Loses(KnowsSome):
        def ask(self, asked: Sequence[Asked], told: Callable[[int, Answer], None]) -> None:
            super().ask(asked[:-1], told)

    with pytest.raises(AssertionError, match="1 questions were left without an answer"):
        scored([exact_task("some", problems("direct", a="1", b="2"), 8, 0)], Loses({}), tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
