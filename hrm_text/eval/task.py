"""What a task of the evaluation is: data as code. A task file names its data, makes questions of rows, and scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Row = Mapping[str, Any]
"""One record of a data set, as upstream publishes it."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Where a task's rows come from: the hub, or a local folder of the same files."""

    hub: str
    """Its name on the Hugging Face hub: ``openai/gsm8k``."""
    config: str | None = None
    """One of the data set's configurations; None where it has but one."""
    split: str = "test"
    revision: str = "main"
    folder: str = ""
    """Its folder below the local one; empty is the task's name. The files are ``SPLIT*.{jsonl,json,parquet,csv}``, in a
    folder of the configuration's name where the task reads several."""


class Rows(Protocol):
    """Reads rows, from wherever the user said."""

    def __call__(self, dataset: Dataset, /) -> Sequence[Row]:
        """All rows of a data set's split, in upstream's order."""
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt with what is needed to score the response."""

    id: str
    """Stable: upstream's own, or the row's number with what tells subsets apart (``anatomy/17``)."""
    prompt: str
    """All of the instruction, examples included."""
    answer: Any
    """What the scorer compares with; JSON."""
    subject: str = ""
    """Part of the task that has a row of its own in tables."""
    choices: int = 0
    """Letters to choose from; 0: the answer is open."""
    shorter: tuple[str, ...] = ()
    """The prompt with fewer and fewer examples, tried in turn where it leaves no room for a response."""
    condition: str = ""
    """Of this question alone; empty is the task's."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What a response is worth."""

    strict: float
    """From 0 to 1; what cannot be read is worth nothing."""
    published: float
    """As the published protocol counts it: an unreadable letter is worth 1 / choices."""
    got: str
    """The answer that was read; empty if there is none."""
    readable: bool
    also: Mapping[str, float] = field(default_factory=dict)
    """Further measures by name, from 0 to 1: DROP's exact match. A task's is the mean over its questions."""
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Further measures by name of parts that weigh alike, whichever question they are of: how many are right, of how
    many. A task's is the sum over the sum: IFEval's instructions."""


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark: a version of its own, its protocol, its data and its scorer."""

    name: str
    version: int
    """Raised whenever a score could change."""
    title: str
    datasets: tuple[Dataset, ...]
    questions: Callable[[Rows], Iterable[Question]]
    score: Callable[[str, Question], Scored]
    condition: str
    """Of the published protocol."""
    max_new_tokens: int
    context: int = 4096
    """Tokens of prompt and response at most."""
    shots: int = 0
    macro: bool = False
    """The score is the mean of the subjects' means."""
    chance: float = 0.0
    """Score that is reached without looking at the question."""
    samples: int = 1
    """Responses to each question; more than one are drawn at ``temperature``."""
    temperature: float = 0.0
    top_p: float = 1.0
    held_in: tuple[str, ...] = ()
    """Sources of the released mixture whose records are this benchmark's training split."""
    runs_code: bool = False
    """Scoring executes what the model wrote: only on request."""

    def asked_under(self, question: Question) -> str:
        """The condition of one of its questions."""
        return question.condition or self.condition
