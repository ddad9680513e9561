from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from hrm_text.contracts import UserError
from hrm_text.eval.answers import Answer, Asked
from hrm_text.eval.comparison import compare
from hrm_text.eval.held_in import RELEASED, Sources, trained_sources
from hrm_text.eval.runs import Plan, plan_run, read_answers, run
from hrm_text.eval.task import Dataset, Question, Row, Rows, Scored, Task
from hrm_text.files import read_json

SUMS = Dataset("someone/sums")


@dataclass
class Table:
    """A source: as many rows as it is told."""

    n: int = 12

    def __call__(self, dataset: Dataset, /) -> Sequence[Row]:
        assert dataset.folder in ("sums", "votes")
        return [{"question": f"{number} + 1", "answer": number + 1} for number in range(self.n)]

    def provenance(self, dataset: Dataset, /) -> dict[str, Any]:
        return {"rows": self.n}


class Killed(Exception):
    pass


@dataclass
class Adds:
    """Answers sums: every third one wrong, every fourth one unreadable; sampled ones by their seed."""

    context: int = 100
    dies_after: int = 10**9
    asked: list[Asked] = field(default_factory=list)
    wrong: int = 3

    def num_tokens(self, condition: str, prompt: str) -> int:
        return len(prompt)

    def ask(self, asked: Sequence[Asked], told: Callable[[int, Answer], None]) -> None:
        self.asked += asked
        for count, index in enumerate(sorted(range(len(asked)), key=lambda n: asked[n].prompt[::-1])):
            if count == self.dies_after:
                raise Killed
            number = int(asked[index].prompt.split()[-3])
            if asked[index].temperature:
                text = str(number + 1 + asked[index].seed % 2)
            else:
                text = "?" if number % 4 == 3 else str(number + 1 + (number % self.wrong == 2))
            told(index, Answer(text, len(text) + 1, "length" if number == 0 else "stop"))

    def speed(self) -> Mapping[str, float]:
        return {"seconds": time.perf_counter()}


def questions(rows: Rows) -> Iterator[Question]:
    for index, row in enumerate(rows(SUMS)):
        yield Question(str(index), row["question"], row["answer"], subject="even" if index % 2 == 0 else "odd")


def score(response: str, question: Question) -> Scored:
    if not response.isdecimal():
        return Scored(0.0, 0.25, "", readable=False)
    right = float(int(response) == question.answer)
    return Scored(right, right, response, readable=True)


TASK = Task("sums", 1, "Sums", (SUMS,), questions, score, "direct", 8, held_in=("sums_train",))
VOTES = replace(TASK, name="votes", samples=4, temperature=1.0)
BOTH = (TASK, replace(TASK, condition="cot"), VOTES)


def planned(tasks: Sequence[Task] = BOTH, answerer: Adds | None = None, rows: int = 12, **options: Any) -> Plan:
    options = {"identity": {"settings": {"dtype": "float32"}}} | options
    return plan_run(tasks, Table(rows), answerer or Adds(), **options)


def without_clock(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = read_json(out / "results.json")
    assert results.pop("speed")
    return results


def test_scores_strict_and_published_side_by_side(tmp_path: Path) -> None:
    results = run(planned([TASK]), Adds(), tmp_path / "run")
    [score] = results["scores"]
    # Of 0..11: 3, 7, 11 cannot be read; 2, 5, 8 are wrong (11 is both).
    assert score["n"] == 12
    assert score["strict"] == 6 / 12
    assert score["published"] == (6 + 3 * 0.25) / 12
    assert score["low"] < score["strict"] < score["high"]
    assert score["unreadable"] == 3 / 12
    assert score["truncated"] == 1 / 12
    assert score["mean_tokens"] == (9 * 2 + 3 * 3) / 12  # to 8, 9 and 10 it says two digits
    assert score["subjects"]["odd"] == {"n": 6, "strict": 2 / 6, "published": (2 + 3 * 0.25) / 6}
    assert results["tasks"]["sums under direct"]["data"] == [{"rows": 12}]
    assert results == read_json(tmp_path / "run" / "results.json")


def test_the_macro_mean_counts_every_subject_the_same(tmp_path: Path) -> None:
    def lopsided(rows: Rows) -> Iterator[Question]:
        for question in questions(rows):
            yield replace(question, subject="three" if question.id == "3" else "others")

    macro = replace(TASK, questions=lopsided, macro=True)
    [score] = run(planned([macro]), Adds(), tmp_path / "run")["scores"]
    assert score["strict"] == (0 + 6 / 11) / 2
    assert score["also"]["mean over questions"] == 6 / 12
    assert score["interval"] == "stratified"


def test_samples_have_seeds_of_their_question_and_number_and_are_voted_on(tmp_path: Path) -> None:
    answerer = Adds()
    [score] = run(planned([VOTES]), answerer, tmp_path / "a")["scores"]
    seeds = {(asked.prompt, asked.seed) for asked in answerer.asked}
    assert len({seed for _, seed in seeds}) == len(seeds) == 48
    assert list(score["also"]) == ["majority", "pass@1", "pass@2", "pass@4"]
    assert score["also"]["pass@1"] == pytest.approx(score["strict"])
    assert score["also"]["pass@1"] < score["also"]["pass@2"] < score["also"]["pass@4"] <= 1
    fewer = Adds()
    run(planned([VOTES], limit=5), fewer, tmp_path / "b")
    assert {(asked.prompt, asked.seed) for asked in fewer.asked} < seeds
    other = Adds()
    run(planned([VOTES], seed=1), other, tmp_path / "c")
    assert not {asked.seed for asked in other.asked} & {seed for _, seed in seeds}


def test_a_limit_takes_the_same_questions_whatever_the_model_and_more_of_them_if_larger() -> None:
    chosen = [
        {item.question.id for item in planned([TASK], Adds(context=context), limit=limit, rows=50).items}
        for context, limit in ((100, 10), (50, 10), (100, 20), (100, 500))
    ]
    assert chosen[0] == chosen[1] < chosen[2] < chosen[3]
    assert [len(each) for each in chosen] == [10, 10, 20, 50]
    assert {item.question.id for item in planned([TASK], limit=10, rows=50, seed=1).items} != chosen[0]
    assert chosen[0] != {str(number) for number in range(10)}


def test_examples_are_left_out_only_where_there_is_no_room(tmp_path: Path) -> None:
    def with_examples(rows: Rows) -> Iterator[Question]:
        for question in questions(rows):
            yield replace(question, prompt="x " * 20 + question.prompt, shorter=("x " * 5 + question.prompt,))

    task = replace(TASK, questions=with_examples)
    answerer = Adds(context=60)
    [whole] = run(planned([task], answerer), answerer, tmp_path / "whole")["scores"]
    assert (whole["shortened"], whole["no_room"]) == (0, 0)
    for context, shortened in ((45, 1.0), (20, 1.0)):
        answerer = Adds(context=context)
        plan = planned([task], answerer)
        [score] = run(plan, answerer, tmp_path / str(context))["scores"]
        assert score["shortened"] == shortened
        assert all(0 < item.max_new_tokens <= context - len(item.prompt) for item in plan.items)


def test_a_question_that_fills_the_context_is_wrong_without_being_asked(tmp_path: Path) -> None:
    answerer = Adds(context=6)  # "10 + 1" leaves no room
    [score] = run(planned([TASK], answerer), answerer, tmp_path / "run")["scores"]
    assert len(answerer.asked) == 10
    assert score["no_room"] == 2 / 12
    assert score["n"] == 12
    lines = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["finish_reason"] for line in lines[-2:]] == ["no room"] * 2


@pytest.mark.parametrize("answered", [0, 1, 40, 71])
def test_a_run_that_died_is_continued_and_ends_the_same(tmp_path: Path, answered: int) -> None:
    run(planned(), Adds(), tmp_path / "whole")
    with pytest.raises(Killed):
        run(planned(), Adds(dies_after=answered), tmp_path / "died")
    assert not (tmp_path / "died" / "results.json").exists()
    again = Adds()
    run(planned(), again, tmp_path / "died")
    assert len(again.asked) == 72 - answered
    assert without_clock(tmp_path / "died") == without_clock(tmp_path / "whole")
    for name in ("answers.jsonl", "questions.jsonl"):
        assert (tmp_path / "died" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_file_cut_at_any_byte_is_continued(tmp_path: Path) -> None:
    """Only whole lines count: the cut one is asked again, and leaves nothing in the middle of the file."""
    plan = planned([TASK])
    run(plan, Adds(), tmp_path / "run")
    whole = (tmp_path / "run" / "answers.jsonl").read_bytes()
    expected = without_clock(tmp_path / "run")
    ends = [index for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (*range(0, len(whole), 97), *ends, *(end + 1 for end in ends)):
        (tmp_path / "run" / "answers.jsonl").write_bytes(whole[:cut])
        answerer = Adds()
        run(plan, answerer, tmp_path / "run")
        assert len(answerer.asked) == 12 - whole[:cut].count(b"\n")
        assert without_clock(tmp_path / "run") == expected
        assert (tmp_path / "run" / "answers.jsonl").read_bytes() == whole


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
import test_runs
class Slow(test_runs.Adds):
    def ask(self, asked, told):
        def slowly(index, answer):
            time.sleep(0.002)
            told(index, answer)
        super().ask(asked, slowly)
test_runs.run(test_runs.planned(), Slow(), Path({out!r}))
"""


def test_kills_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL, again and again, each time a little later: the run comes to its end with the same results."""
    run(planned(), Adds(), tmp_path / "whole")
    code = SLOW.format(folder=str(Path(__file__).parent), out=str(tmp_path / "killed"))
    answers = tmp_path / "killed" / "answers.jsonl"
    for least in (1, 20, 50):
        process = subprocess.Popen([sys.executable, "-c", code])
        while process.poll() is None and not (answers.exists() and answers.read_bytes().count(b"\n") >= least):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 50 <= len(read_answers(answers)) < 72
    run(planned(), Adds(), tmp_path / "killed")
    assert without_clock(tmp_path / "killed") == without_clock(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"identity": {"settings": {"dtype": "bfloat16"}}}, "settings.dtype was 'float32' and is 'bfloat16'"),
        ({"limit": 3}, "limit was absent and is 3"),
        ({"seed": 2}, "seed was 0 and is 2"),
        ({"rows": 13}, r"tasks.sums under direct.questions was 12 and is 13"),
        ({"tasks": [replace(TASK, version=2)]}, "tasks.sums under direct.version was 1 and is 2"),
        ({"tasks": BOTH}, "tasks.sums under cot was absent and is"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    run(planned([TASK]), Adds(), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=message):
        run(planned(**{"tasks": [TASK], **changed}), Adds(), tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_other_folders_and_damaged_lines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="is there and is no evaluation"):
        run(planned([TASK]), Adds(), tmp_path)
    run(planned([TASK]), Adds(), tmp_path / "run")
    answers = tmp_path / "run" / "answers.jsonl"
    answers.write_bytes(b'{"task": 1}\n' + answers.read_bytes())
    with pytest.raises(UserError, match=r"answers.jsonl:1: damaged"):
        run(planned([TASK]), Adds(), tmp_path / "run")


def test_machines_are_remembered(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(planned([TASK]), Adds(dies_after=3), tmp_path / "run", machine={"cores": "2"})
    results = run(planned([TASK]), Adds(), tmp_path / "run", machine={"cores": "64"})
    assert results["machines"] == [{"cores": "2"}, {"cores": "64"}]


def test_a_finished_run_started_again_asks_nothing_and_keeps_its_speed(tmp_path: Path) -> None:
    first, again = run(planned(), Adds(), tmp_path / "run"), Adds()
    assert run(planned(), again, tmp_path / "run") == first
    assert not again.asked


def test_tasks_that_cannot_be_scored_are_refused() -> None:
    for tasks, message in (
        ([], "no task to evaluate"),
        ([TASK, TASK], "'sums' is named twice under direct"),
        ([replace(TASK, questions=lambda rows: [])], "'sums' has no items"),
        ([replace(TASK, questions=lambda rows: [*questions(rows), *questions(rows)])], "2 questions have the id '0'"),
    ):
        with pytest.raises(UserError, match=message):
            planned(tasks)
    with pytest.raises(UserError, match="at least 1 item per task, found 0"):
        planned(limit=0)


def test_held_in_is_declared_or_read_from_the_mixture(tmp_path: Path) -> None:
    def label(number: int, task: Task, sources: Sources | None) -> str:
        [score] = run(planned([task]), Adds(), tmp_path / f"{number}", sources=sources)["scores"]
        return str(score["held"])

    strata = [{"name": "sums_train__train.parquet", "drawn_rows": 5}, {"name": "poems.jsonl", "drawn_rows": 0}]
    (tmp_path / "sampling.json").write_text(json.dumps({"strata": strata}))
    trained = trained_sources(tmp_path)
    assert trained == {"sums_train"} == trained_sources(tmp_path / "sampling.json")
    assert label(0, TASK, RELEASED) == "in"
    assert label(1, TASK, trained) == "in"
    assert label(2, TASK, frozenset({"poems"})) == "out"
    assert label(3, replace(TASK, held_in=()), RELEASED) == "out"
    assert label(4, TASK, None) == "unknown"
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="expected the sampling.json of a sampled folder"):
        trained_sources(tmp_path / "other.json")


def test_two_runs_are_compared_question_by_question(tmp_path: Path) -> None:
    run(planned(), Adds(), tmp_path / "a")
    run(planned([TASK]), Adds(wrong=10**9), tmp_path / "b")
    [row] = compare(tmp_path / "a", tmp_path / "b")
    assert (row.task, row.condition, row.first, row.second) == ("sums", "direct", 6 / 12, 8 / 12)
    assert (row.paired.n, row.paired.first_better, row.paired.second_better, row.paired.p) == (12, 0, 2, 0.5)
    run(planned([TASK], limit=5), Adds(), tmp_path / "fewer")
    with pytest.raises(UserError, match="sums under direct: the two runs differ in questions_sha256"):
        compare(tmp_path / "a", tmp_path / "fewer")
    with pytest.raises(UserError, match=r"results.json: no such file"):
        compare(tmp_path / "a", tmp_path / "none")


def test_rows_of_another_schema_are_one_clear_error() -> None:
    def others(rows: Rows) -> Iterator[Question]:
        for row in rows(SUMS):
            yield Question("1", row["problem"], 1)

    with pytest.raises(UserError, match=r"task 'sums': a row is not as someone/sums publishes it \(no 'problem'\)"):
        planned([replace(TASK, questions=others)])


def test_a_letter_is_one_token_and_not_cut(tmp_path: Path) -> None:
    for most, share in ((8, 1 / 12), (1, 0.0)):
        [score] = run(planned([replace(TASK, max_new_tokens=most)]), Adds(), tmp_path / str(most))["scores"]
        assert score["truncated"] == share
