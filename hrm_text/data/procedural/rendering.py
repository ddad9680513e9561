"""From a problem to the text of an example, and from a response back to its answer."""

from __future__ import annotations

import random
import re

from hrm_text.contracts import Example
from hrm_text.data.procedural.registry import Problem, Task

RESULT = "= "
"""What comes before the answer at the end of step-by-step working. Working itself never has ``=`` before a space."""

_FIELD = re.compile(r"(\{\w+\})")
_NEIGHBOURS = dict(zip("abcdefghijklmnopqrstuvwxyz", "svxfrghjoklknmpowtdyibectx", strict=True))
"""Of each letter the one beside it on the keyboard."""


def render(task: Task, problem: Problem, condition: str, wording: int, rng: random.Random) -> Example:
    """The example that asks ``problem`` in one wording under one condition.

    The tags compose: ``cot`` puts the working before the answer, ``synth`` makes the answer a sentence and ``noisy``
    puts typing errors into the wording (never into the problem itself). ``rng`` draws the errors and nothing else.
    """
    tags = condition.split(",")
    template = task.wordings[wording]
    if "noisy" in tags:
        template = misspell(template, rng)
    answer = problem.answer
    if "synth" in tags:
        answer = task.sentence.format(**problem.fields, answer=answer)
    if "cot" in tags:
        assert task.steps is not None, f"{task.name} has no working to show"
        mark = "" if "synth" in tags else RESULT
        answer = f"{task.steps(**problem.fields)} {mark}{answer}"
    return Example(condition, template.format(**problem.fields), answer)


def answer_of(task: Task, response: str) -> str:
    """The final answer within a response, whatever its condition: the one rule that scoring goes by.

    It is what follows the last ``= `` or the lead-in of the task's sentence (there without the full stop); a response
    with neither is the answer as it stands.
    """
    text = response.strip()
    _, found, sentence_answer = text.rpartition(task.lead_in)
    if found:
        return sentence_answer.removesuffix(".").strip()
    return text.rpartition(RESULT)[2].strip()


def misspell(template: str, rng: random.Random) -> str:
    """One or two typing errors in the words of a template; its fields and the spaces around them stay.

    An error is two letters swapped, a letter dropped, doubled or replaced by its neighbour on the keyboard, a word in
    capitals, or a space too many; a template without words gets the spaces alone.
    """
    parts = _FIELD.split(template)
    places = [
        (i, match.start(), match.end())
        for i in range(0, len(parts), 2)
        for match in re.finditer(r"[A-Za-z]{3,}", parts[i])
    ]
    if not places:
        return template.replace(" ", "  ")
    errors = 1 + int(rng.random() * 2)
    # From the right, so that an error does not move the places of the others.
    for i, start, end in sorted(rng.sample(places, min(errors, len(places))), reverse=True):
        parts[i] = parts[i][:start] + _misspell_word(parts[i][start:end], rng) + parts[i][end:]
    return "".join(parts)


def _misspell_word(word: str, rng: random.Random) -> str:
    i = int(rng.random() * (len(word) - 1))
    kind = int(rng.random() * 6)
    if kind == 0:
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if kind == 1:
        return word[:i] + word[i + 1 :]
    if kind == 2:
        return word[:i] + word[i] + word[i:]
    if kind == 3:
        return word[:i] + _NEIGHBOURS[word[i].lower()] + word[i + 1 :]
    if kind == 4:
        return word.upper()
    return word + "  "
