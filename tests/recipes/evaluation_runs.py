"""Finished runs of the evaluation, of sums that a table answers: what the tests of its report read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hrm_text.eval.answers import Answer, Asked
from hrm_text.eval.comparison import compare
from hrm_text.eval.runs import plan_run, run
from hrm_text.eval.task import Dataset, Question, Row, Rows, Scored, Task
from hrm_text.files import read_json, write_json

HOSTILE = (
    "</script><script>window.hacked = 1</script><!-- <img src=x onerror='window.hacked = 1'> ]]> {{ 7*7 }} $& \\u003c "
    "a\u2028b\u2029c \ud800 \x00\x1b[31m \u202egnp.exe\u202c ```` | *x* & &lt;b&gt;"
)


def data(n: int) -> list[Row]:
    return [{"n": number} for number in range(n)]


@dataclass
class Table:
    n: int

    def __call__(self, dataset: Dataset, /) -> Sequence[Row]:
        return data(self.n)

    def provenance(self, dataset: Dataset, /) -> dict[str, Any]:
        return {"files": {"sums/test.jsonl": "ab" * 32}}


@dataclass
class Says:
    """Answers by a function of the question's number and condition; a number of 7 characters fills the context."""

    answer: Callable[[int, str], tuple[str, Any]]
    context: int = 200
    wordy: bool = False

    def num_tokens(self, condition: str, prompt: str) -> int:
        return 1000 if int(prompt.split("#")[1]) == 13 else 20

    def ask(self, asked: Sequence[Asked], told: Callable[[int, Answer], None]) -> None:
        for index, each in enumerate(asked):
            text, finish = self.answer(int(each.prompt.split("#")[1]), each.condition)
            told(index, Answer(text, len(text), finish))

    def speed(self) -> Mapping[str, float]:
        return {
            "batch": 8,
            "seconds": 1.5,
            "prompt_tokens_per_second": 10.0,
            "tokens_per_second": 1234.0,
            "busy_slots": 0.97,
            "steps": 5,
            "steps_of_tail": 1,
        }


def sums(n: int, cond: str) -> tuple[str, Any]:
    """Of every five: two right, one wrong, one unreadable and one cut; step by step all are right."""
    if cond == "cot" or n % 5 < 2:
        return f"so {n + 1}", "stop"
    return (f"so {n}", "stop") if n % 5 == 2 else ("no idea", "stop") if n % 5 == 3 else ("so so so", "length")


def score(response: str, question: Question) -> Scored:
    last = response.split(" ")[-1]
    if not last.isdecimal():
        return Scored(0.0, 0.25, "", readable=False)
    worth = float(int(last) == question.answer)
    return Scored(worth, worth, last, readable=True)


def task(prefix: str = "add one to ", name: str = "sums", **changes: Any) -> Task:
    def questions(rows: Rows) -> Iterator[Question]:
        for row in rows(Dataset("someone/sums")):
            number = row["n"]
            yield Question(f"q{number}", f"{prefix}#{number}", number + 1, subject="even" if number % 2 == 0 else "odd")

    plain = Task(name, 1, "Sums", (Dataset("someone/sums"),), questions, score, "direct", 64, chance=0.1)
    return replace(plain, **changes)


IDENTITY = {
    "weights_sha256": "c0ffee" * 8,
    "settings": {"device": "cpu", "dtype": "float32"},
    "versions": {"hrm-text": "0.1", "sympy": "1.14"},
}


def finished(
    out: Path, tasks: Sequence[Task], answer: Callable[[int, str], tuple[str, Any]] = sums, rows: int = 20
) -> Path:
    answerer = Says(answer)
    run(plan_run(tasks, Table(rows), answerer, identity=IDENTITY), answerer, out, machine={"device": "cpu: abacus"})
    return out


def compared(out: Path, tasks: Sequence[Task]) -> Path:
    finished(out, tasks)
    finished(out / "against", tasks, lambda n, cond: (f"so {n + 1}", "stop"))
    found = {"first": {}, "second": {"weights": "b/weights", "run": str(out / "against"), "weights_sha256": "beef"}}
    rows = [asdict(row) for row in compare(out, out / "against")]
    write_json(out / "comparison.json", found | {"test": "exact", "rows": rows})
    return out


def hostile(out: Path) -> Path:
    whole = HOSTILE.replace("\ud800", "?")
    named = task(HOSTILE, whole, title=whole, held_in=(whole,))
    finished(out, [named], lambda n, cond: (HOSTILE, "stop"), rows=3)
    results = read_json(out / "results.json")
    results["versions"][HOSTILE] = results["machines"][0][HOSTILE] = HOSTILE
    (out / "results.json").write_text(json.dumps(results))
    for name in ("answers.jsonl", "questions.jsonl"):  # half a pair as an escape, as any other tool might write it
        lines = [json.loads(line) for line in (out / name).read_bytes().splitlines()]
        lines = [line | dict.fromkeys(("text", "got", "prompt", "answer", "subject"), HOSTILE) for line in lines]
        (out / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out
