"""A run of the evaluation: tasks in, ``results.json`` out, whatever was killed in between.

    OUT/run.json         what is evaluated, and how: a run that differs in any of it is refused
    OUT/questions.jsonl  every question as it is asked
    OUT/answers.jsonl    every response, a line each; once all are there, in the order of the questions, with its score
    OUT/results.json     the scores, written last

Killed at any moment and started again, a run asks what has no whole line in ``answers.jsonl``, and ends with the same
results, figures of the clock aside.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from hrm_text.contracts import UserError
from hrm_text.eval.answers import Answer, Answerer, Asked
from hrm_text.eval.held_in import Sources, held
from hrm_text.eval.scores import Answered, TaskScore, answered, score_task
from hrm_text.eval.sources import Source
from hrm_text.eval.task import Dataset, Question, Row, Task
from hrm_text.files import explained_disk_errors, read_json, remove_leftovers, whole_file, write_json

FORMAT = 1
"""Of the files of a run."""

ROOM = 64
"""Tokens that a prompt with examples must leave for the response, or examples are left out: those that show how to
answer show short answers. A task whose responses are shorter needs no more than they."""

Key = tuple[str, str, str, int]
"""Of a response: task, condition, question, sample."""


@dataclass(frozen=True, slots=True)
class Item:
    """A question of a task, as it is asked."""

    task: Task
    question: Question
    prompt: str
    """The question's own, or the first of the shorter ones that leaves room for a response."""
    max_new_tokens: int
    """0: the prompt leaves no room, and nothing is asked."""

    @property
    def condition(self) -> str:
        """What it is asked under."""
        return self.task.asked_under(self.question)

    def key(self, sample: int) -> Key:
        """Of one of its responses."""
        return self.task.name, self.task.condition, self.question.id, sample


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a run asks."""

    tasks: Sequence[Task]
    """The same task may be there under several conditions."""
    items: Sequence[Item]
    """Of all tasks, in their order."""
    seed: int
    identity: Mapping[str, Any]
    """Whatever a score depends on; JSON."""

    def asked(self, item: Item, sample: int) -> Asked:
        """The request for one response; its seed is of the question and the sample alone."""
        task = item.task
        drawn = json.dumps([self.seed, task.name, item.question.id, sample])
        seed = int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:8], "little")
        return Asked(item.condition, item.prompt, item.max_new_tokens, task.temperature, task.top_p, seed)


# ------------------------------------------------------------------------------------------------------- planning ---


def plan_run(
    tasks: Sequence[Task],
    source: Source,
    answerer: Answerer,
    *,
    identity: Mapping[str, Any],
    limit: int | None = None,
    seed: int = 0,
) -> Plan:
    """Read the questions and lay them out.

    Args:
        tasks: each under its condition; no two alike.
        source: of the rows.
        answerer: says how long prompts are, and how much there is room for.
        identity: of the model and whatever else answers depend on, as JSON; the tasks are added.
        limit: most questions of a task: the first by an order that ``seed`` and their ids alone decide.
        seed: of that order, and of responses that are drawn.

    Raises:
        UserError: no task, two alike, a task without questions, a limit below 1; or the source cannot read.
    """
    if not tasks:
        raise UserError("no task to evaluate; name at least one")
    if limit is not None and limit < 1:
        raise UserError(f"limit: expected at least 1 item per task, found {limit}")
    names = [(task.name, task.condition) for task in tasks]
    for name, condition in names:
        if names.count((name, condition)) > 1:
            raise UserError(f"task {name!r} is named twice under {condition}; their scores could not be told apart")
    items: list[Item] = []
    described: dict[str, Any] = {}
    read: dict[tuple[str, int], tuple[list[Question], list[Any]]] = {}
    for task in tasks:
        same = task.name, id(task.questions)  # under several conditions it is read once
        if same not in read:
            read[same] = _read(task, source, limit, seed)
        questions, data = read[same]
        items += [_fitted(task, question, answerer) for question in questions]
        described[f"{task.name} under {task.condition}"] = _description(task, questions, data)
    return Plan(tasks, items, seed, {"format": FORMAT, **identity, "seed": seed, "limit": limit, "tasks": described})


def _read(task: Task, source: Source, limit: int | None, seed: int) -> tuple[list[Question], list[Any]]:
    """The questions to ask, in their own order, and what the data are that they come from."""
    seen: dict[Dataset, None] = {}

    def rows(dataset: Dataset, /) -> Sequence[Row]:
        there = replace(dataset, folder=dataset.folder or task.name)
        seen[there] = None
        return source(there)

    try:
        questions = list(task.questions(rows))
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        hubs = ", ".join(dict.fromkeys(dataset.hub for dataset in seen)) or "its data"
        raise UserError(
            f"task {task.name!r}: a row is not as {hubs} publishes it ({what}); fetch the files anew, or see which "
            "fields the task reads"
        ) from error
    if not questions:
        raise UserError(f"task {task.name!r} has no items to evaluate")
    ids = Counter(question.id for question in questions)
    [(twice, count)] = ids.most_common(1)
    if count > 1:
        raise UserError(f"task {task.name!r}: {count} questions have the id {twice!r}; the data hold a row twice")
    if limit is not None:
        drawn = sorted(ids, key=lambda each: hashlib.sha256(json.dumps([seed, each]).encode()).digest())
        chosen = set(drawn[:limit])
        questions = [question for question in questions if question.id in chosen]
    return questions, [source.provenance(dataset) for dataset in seen]


def _fitted(task: Task, question: Question, answerer: Answerer) -> Item:
    """The question with as many examples as leave room for a response; if none do, with the fewest."""
    context = min(task.context, answerer.context)
    room = min(task.max_new_tokens, ROOM)
    prompt, length = question.prompt, 0
    for prompt in (question.prompt, *question.shorter):
        length = answerer.num_tokens(task.asked_under(question), prompt)
        if length + room <= context:
            break
    return Item(task, question, prompt, max(0, min(task.max_new_tokens, context - length)))


def _description(task: Task, questions: Sequence[Question], data: Sequence[Any]) -> dict[str, Any]:
    """What a task's score depends on besides the model."""
    digest = hashlib.sha256()
    for each in questions:
        content = [each.id, each.prompt, each.answer, each.subject, each.choices, each.shorter, each.condition]
        digest.update(json.dumps(content, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
    settings = ("version", "max_new_tokens", "context", "shots", "samples", "temperature", "top_p")
    described = {name: getattr(task, name) for name in settings}
    return described | {"questions": len(questions), "questions_sha256": digest.hexdigest(), "data": list(data)}


# --------------------------------------------------------------------------------------------------------- running ---


def run(
    plan: Plan,
    answerer: Answerer,
    out: Path,
    *,
    machine: Mapping[str, Any] | None = None,
    sources: Sources | None = None,
    on_progress: Callable[[float, float], None] | None = None,
) -> dict[str, Any]:
    """Ask what has not been answered yet, score everything, and write it down.

    Args:
        plan: what to ask.
        answerer: what answers.
        out: the run's folder; one that is there must be of the same plan, and is continued.
        machine: on which the answers are made, for the record.
        sources: of records that the model was trained upon; None: not known.
        on_progress: called with the responses that are there, and their number in all.

    Returns:
        What ``results.json`` holds.

    Raises:
        UserError: the folder is of another run; the message names what differs. Or it holds something else.
    """
    machines = _begin(out, plan, machine)
    wanted = [(item, sample) for item in plan.items for sample in range(item.task.samples)]
    keys = [item.key(sample) for item, sample in wanted]
    path = out / "answers.jsonl"
    answers = read_answers(path)
    missing = [number for number, key in enumerate(keys) if key not in answers and wanted[number][0].max_new_tokens]
    there = len(keys) - len(missing)
    if missing:
        with _appending(path) as file:

            def told(index: int, answer: Answer) -> None:
                nonlocal there
                key = keys[missing[index]]
                answers[key] = answer
                file.write(_line(_record(key) | asdict(answer)))
                file.flush()
                there += 1
                if on_progress is not None:
                    on_progress(there, len(keys))

            answerer.ask([plan.asked(*wanted[number]) for number in missing], told)
        assert there == len(keys), f"{len(keys) - there} questions were left without an answer"
    nothing = Answer("", 0, "no room")
    scored = [
        answered(item.task, item.question, [answers.get(item.key(n), nothing) for n in range(item.task.samples)])
        for item in plan.items
    ]
    with whole_file(path) as beside, beside.open("wb") as lines:
        lines.writelines(_scored_lines(plan, scored))
    speed = dict(answerer.speed())
    if not missing and (out / "results.json").exists():
        speed = read_json(out / "results.json")["speed"]  # nothing was asked anew
    found = dict(plan.identity) | {
        "machines": machines,
        "scores": [asdict(score) for score in _scores(plan, scored, sources)],
        "speed": speed,
    }
    results: dict[str, Any] = json.loads(json.dumps(found))
    write_json(out / "results.json", results)
    return results


def _scores(plan: Plan, scored: Sequence[Answered], sources: Sources | None) -> Iterator[TaskScore]:
    for task in plan.tasks:
        of_task = [number for number, item in enumerate(plan.items) if item.task is task]
        short = sum(plan.items[number].prompt != plan.items[number].question.prompt for number in of_task)
        yield score_task(task, [scored[n] for n in of_task], held(task, sources), short / len(of_task))


def _scored_lines(plan: Plan, scored: Sequence[Answered]) -> Iterator[bytes]:
    for item, result in zip(plan.items, scored, strict=True):
        for sample, (answer, worth) in enumerate(zip(result.answers, result.scored, strict=True)):
            yield _line(_record(item.key(sample)) | asdict(answer) | asdict(worth) | {"subject": item.question.subject})


def _begin(out: Path, plan: Plan, machine: Mapping[str, Any] | None) -> list[Any]:
    """Write down what is run, or see that what was run is the same; the machines that were at it."""
    note, questions = out / "run.json", out / "questions.jsonl"
    identity = json.loads(json.dumps(plan.identity))
    machines = [] if machine is None else [dict(machine)]
    if note.exists():
        before = read_json(note)
        if differences := _differences(before.get("identity"), identity):
            raise UserError(
                f"{out}: holds another evaluation, which can neither be continued nor mixed with this one: "
                f"{'; '.join(differences)}. Choose another folder with --out, or remove this one"
            )
        machines = [*before["machines"], *(each for each in machines if each not in before["machines"])]
    elif out.exists() and not (out.is_dir() and all(path.name.startswith(".") for path in out.iterdir())):
        raise UserError(f"{out}: is there and is no evaluation; choose another folder with --out")
    remove_leftovers(out)
    write_json(note, {"identity": identity, "machines": machines})  # first: it marks the folder as ours
    if not questions.exists():
        with whole_file(questions) as beside, beside.open("wb") as lines:
            lines.writelines(map(_question_line, plan.items))
    return machines


def _differences(before: Any, now: Any, place: str = "") -> list[str]:
    """What is not the same in two JSON values, as ``settings.dtype was 'float32' and is 'bfloat16'``."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = dict.fromkeys([*before, *now])
        below = f"{place}." if place else ""
        return [text for name in names for text in _differences(before.get(name), now.get(name), f"{below}{name}")]
    return [] if before == now else [f"{place or 'the run'} was {_brief(before)} and is {_brief(now)}"]


def _brief(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ----------------------------------------------------------------------------------------------------------- lines ---


def read_answers(path: Path) -> dict[Key, Answer]:
    """The responses of whole lines; what a kill has cut does not count. None where there is no file.

    Raises:
        UserError: a whole line is damaged.
    """
    answers: dict[Key, Answer] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), start=1):
        try:
            found = json.loads(line)
            key = (found["task"], found["condition"], found["id"], found["sample"])
            answers.setdefault(key, Answer(found["text"], found["num_tokens"], found["finish_reason"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: damaged ({type(error).__name__}: {error}); remove the line, it is asked again"
            ) from None
    return answers


@contextmanager
def _appending(path: Path) -> Iterator[BinaryIO]:
    """The file, open behind its last whole line."""
    with explained_disk_errors(path), path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.seek(0, os.SEEK_END)
        yield file


def _record(key: Key) -> dict[str, Any]:
    return dict(zip(("task", "condition", "id", "sample"), key, strict=True))


def _question_line(item: Item) -> bytes:
    question = {name: getattr(item.question, name) for name in ("id", "answer", "subject", "choices")}
    place = {"task": item.task.name, "condition": item.task.condition, "asked_under": item.condition}
    return _line(place | question | {"prompt": item.prompt, "max_new_tokens": item.max_new_tokens})


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
