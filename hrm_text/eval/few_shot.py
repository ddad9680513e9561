"""Examples in a prompt, and the form of multiple choice: the one place that lays both out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from hrm_text.eval.scoring.letters import letter, score_sole_letter
from hrm_text.eval.task import Dataset, Question, Row, Rows, Task


class Shot(NamedTuple):
    """A question that is answered in the prompt."""

    asked: str
    """As the question itself is asked: up to where the answer begins."""
    answer: str


class Choice(NamedTuple):
    """A question with options, of which one is right."""

    text: str
    options: Sequence[str]
    right: int
    """Number of the right option, from 0."""

    @property
    def asked(self) -> str:
        """The question, a line for each option under its letter, and where the answer goes."""
        lines = [f"{letter(index)}. {option.strip()}" for index, option in enumerate(self.options)]
        return "\n".join([self.text.strip(), *lines, "Answer:"])

    @property
    def shot(self) -> Shot:
        """The question with its answer."""
        return Shot(self.asked, letter(self.right))


class FewShot:
    """Puts the same examples before every question, an empty line behind each.

    Where the prompt leaves no room for a response, half of the examples stay, the first ones, then half of those, down
    to none. Halves keep what a question holds in memory at twice its prompt, where one example less each time would
    make it thirteen times with 25 examples.
    """

    def __init__(self, shots: Iterable[Shot] = ()) -> None:
        blocks = [f"{shot.asked} {shot.answer}\n\n" for shot in shots]
        counts = [len(blocks)]
        while counts[-1]:
            counts.append(counts[-1] // 2)
        self._heads = ["".join(blocks[:count]) for count in counts]

    def ask(self, asked: str, **fields: Any) -> Question:
        """A question with the examples before it; ``fields`` are the others of ``Question``."""
        prompt, *shorter = (head + asked for head in self._heads)
        return Question(prompt=prompt, shorter=tuple(shorter), **fields)

    def choose(self, choice: Choice, **fields: Any) -> Question:
        """A question whose answer is a letter."""
        return self.ask(choice.asked, answer=letter(choice.right), choices=len(choice.options), **fields)


def choice_task(
    name: str,
    title: str,
    *,
    examples: Dataset,
    asked: Dataset,
    choice: Callable[[Row], Choice],
    shots: int,
    chance: float,
    held_in: tuple[str, ...],
) -> Task:
    """A benchmark of the published protocol that is answered by the letter of an option, and nothing else.

    Args:
        name: of the task.
        title: for people.
        examples: the split whose first ``shots`` rows stand, answered, before every question.
        asked: the split of which every row is a question, named by its ``id`` or else its number.
        choice: reads a row of either.
        shots: examples.
        chance: score that is reached without looking at the question.
        held_in: see ``Task``.
    """

    def questions(rows: Rows) -> Iterator[Question]:
        few = FewShot(choice(row).shot for row in islice(rows(examples), shots))
        for index, row in enumerate(rows(asked)):
            yield few.choose(choice(row), id=str(row.get("id", index)))

    data, score = (examples, asked), score_sole_letter
    return Task(name, 1, title, data, questions, score, "direct", 1, shots=shots, chance=chance, held_in=held_in)
