"""From answers to scores: what every response is worth, and what a task's questions come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hrm_text.eval.answers import Answer
from hrm_text.eval.held_in import Held
from hrm_text.eval.scoring.votes import majority_score, pass_at_k
from hrm_text.eval.statistics import macro_interval, mean, mean_interval
from hrm_text.eval.task import Question, Scored, Task


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with its responses, one for each sample, and what they are worth."""

    question: Question
    answers: Sequence[Answer]
    scored: Sequence[Scored]

    @property
    def strict(self) -> float:
        """Mean over the samples."""
        return mean([each.strict for each in self.scored])

    @property
    def published(self) -> float:
        """Mean over the samples."""
        return mean([each.published for each in self.scored])


@dataclass(frozen=True, slots=True)
class SubjectScore:
    """A row of the table of a task's subjects."""

    n: int
    strict: float
    published: float


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What a model makes of a task under a condition. All shares and scores are from 0 to 1."""

    task: str
    condition: str
    title: str
    version: int
    n: int
    """Questions."""
    strict: float
    """What cannot be read is wrong. The mean over the questions, or of the subjects' means where ``macro``."""
    low: float
    """Bounds of ``strict`` at 95 %."""
    high: float
    interval: str
    """How they were found: see ``statistics``."""
    published: float
    """By the rules of the published protocol."""
    published_low: float
    published_high: float
    chance: float
    macro: bool
    held: Held
    """Whether the training split of this benchmark was trained upon."""
    held_in: tuple[str, ...]
    """The sources of training records that are it."""
    unreadable: float
    """Share of responses in which no answer was found."""
    truncated: float
    """Share of responses cut at the most tokens, or the end of the context; a letter is one token and never cut."""
    no_room: float
    """Share of questions that fill the context, and are wrong without having been asked."""
    shortened: float
    """Share of questions that were given fewer examples than the protocol's, for want of room."""
    mean_tokens: float
    """Of a response."""
    samples: int
    also: Mapping[str, float] = field(default_factory=dict)
    """Further measures: the mean over the questions, or the share of all that is counted."""
    subjects: Mapping[str, SubjectScore] = field(default_factory=dict)


def answered(task: Task, question: Question, answers: Sequence[Answer]) -> Answered:
    """Score the responses to a question."""
    return Answered(question, answers, [task.score(answer.text, question) for answer in answers])


def score_task(task: Task, results: Sequence[Answered], held: Held, shortened: float) -> TaskScore:
    """The score of a task: ``results`` of all its questions, in any order."""
    strict = [each.strict for each in results]
    published = [each.published for each in results]
    subjects = {name: [each for each in results if each.question.subject == name] for name in _subjects(results)}
    if task.macro:
        by_subject = {name: [each.strict for each in inside] for name, inside in subjects.items()}
        by_subject_published = {name: [each.published for each in inside] for name, inside in subjects.items()}
        score, interval = mean([mean(values) for values in by_subject.values()]), macro_interval(by_subject)
        as_published = mean([mean(values) for values in by_subject_published.values()])
        published_interval = macro_interval(by_subject_published)
    else:
        score, interval = mean(strict), mean_interval(strict)
        as_published, published_interval = mean(published), mean_interval(published)
    answers = [answer for each in results for answer in each.answers]
    scored = [one for each in results for one in each.scored]
    asked = [answer for answer in answers if answer.finish_reason != "no room"]
    return TaskScore(
        task=task.name,
        condition=task.condition,
        title=task.title,
        version=task.version,
        n=len(results),
        strict=score,
        low=interval.low,
        high=interval.high,
        interval=interval.method,
        published=as_published,
        published_low=published_interval.low,
        published_high=published_interval.high,
        chance=task.chance,
        macro=task.macro,
        held=held,
        held_in=task.held_in,
        unreadable=mean([float(not each.readable) for each in scored]),
        truncated=mean([float(answer.finish_reason == "length" and task.max_new_tokens > 1) for answer in answers]),
        no_room=mean([float(answer.finish_reason == "no room") for answer in answers]),
        shortened=shortened,
        mean_tokens=mean([answer.num_tokens for answer in asked]),
        samples=task.samples,
        also=_also(task, results),
        subjects={
            name: SubjectScore(len(inside), mean([e.strict for e in inside]), mean([e.published for e in inside]))
            for name, inside in subjects.items()
            if name
        },
    )


def _subjects(results: Sequence[Answered]) -> list[str]:
    return sorted({each.question.subject for each in results})


def _also(task: Task, results: Sequence[Answered]) -> dict[str, float]:
    """The scorer's further measures; of sampled tasks also the majority vote, and pass@k for k in powers of two."""
    names = list(dict.fromkeys(name for each in results for one in each.scored for name in one.also))
    measures = {}
    for name in names:
        measures[name] = mean([mean([one.also.get(name, 0.0) for one in each.scored]) for each in results])
    counted = [one.counts for each in results for one in each.scored]
    for name in dict.fromkeys(name for counts in counted for name in counts):
        pairs = [counts[name] for counts in counted if name in counts]
        measures[name] = sum(right for right, _ in pairs) / max(sum(of for _, of in pairs), 1)
    if task.macro:
        measures["mean over questions"] = mean([each.strict for each in results])
    if task.samples > 1:
        measures["majority"] = mean([majority_score(each.scored) for each in results])
        sizes = [2**power for power in range(task.samples.bit_length()) if 2**power <= task.samples]
        for k in dict.fromkeys([*sizes, task.samples]):
            right = [sum(one.strict == 1 for one in each.scored) for each in results]
            measures[f"pass@{k}"] = mean([pass_at_k(task.samples, count, k) for count in right])
    return measures
