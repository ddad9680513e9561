"""reasoning-gym (Stojanovski et al. 2025): twenty tasks with short questions and one right answer each."""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from hrm_text.contracts import Example
from hrm_text.data.sources.registry import Keyed, python_module, source


def by_numbers(question: str, answer: str) -> str:
    """The numbers of the question, sorted: the same for every wording and for swapped operands."""
    return " ".join(sorted(re.findall(r"\d+(?:\.\d+)?", question)))


def by_answer(question: str, answer: str) -> str:
    """The answer: all questions that lead to it are on one side."""
    return answer


def by_text(question: str, answer: str) -> str:
    """The question as it stands, for tasks with one wording."""
    return question


def by_story(question: str, answer: str) -> str:
    """The first paragraph: all questions about a story are on one side."""
    return question.partition("\n\n")[0]


TASKS: dict[str, Callable[[str, str], str]] = {
    "aiw": by_numbers,
    "base_conversion": by_text,
    "basic_arithmetic": by_numbers,
    "caesar_cipher": by_answer,
    "calendar_arithmetic": by_text,
    "chain_sum": by_numbers,
    "complex_arithmetic": by_numbers,
    "count_bits": by_numbers,
    "count_primes": by_numbers,
    "decimal_chain_sum": by_numbers,
    "family_relationships": by_story,
    "fraction_simplification": by_numbers,
    "gcd": by_numbers,
    "lcm": by_numbers,
    "leg_counting": by_text,
    "letter_counting": by_text,
    "prime_factorization": by_numbers,
    "products": by_numbers,
    "spell_backward": by_answer,
    "syllogism": by_text,
}
"""Each task with what makes two of its questions the same problem.

Left out on purpose: ``gsm_symbolic`` (its templates share runs of words with the GSM8K test set), ``codeio`` (it runs
bundled code), ``number_sequence`` (one item may take a minute), tasks without a stored answer or with several right
ones, and those that make fewer than 2,000 questions a second.
"""

LEVELS = (0, 1)
"""Curriculum levels, in turn."""


def dataset(task: str, level: int, seed: int) -> Any:
    """A task's data set with every attribute of its curriculum at a level, or at its highest if that is lower.

    Item i is drawn from seed + i, so near seeds give the same items: ``seed`` is spread over the integers by hashing.
    """
    factory = importlib.import_module("reasoning_gym.factory")
    curriculum = factory.CURRICULA[task]()
    curriculum.set_global_level(level)
    spread = random.Random(f"{task} {level} {seed}").randrange(2**40)
    make, _ = factory.DATASETS[task]
    return make(curriculum.generate_configuration({"size": 2**20, "seed": spread}))


@source(
    "reasoning_gym",
    licence="Apache-2.0",
    home="https://github.com/open-thought/reasoning-gym",
    condition="direct",
    files=dict.fromkeys(TASKS, 12_000),
    needs=python_module("reasoning_gym"),
)
def generate(file: str, seed: int) -> Iterator[Keyed]:
    """Small reasoning tasks at the two lowest levels of their curricula; the stored answer alone counts as right."""
    levels = [dataset(file, level, seed) for level in LEVELS]
    for i in range(2**20):
        entry = levels[i % len(levels)][i // len(levels)]
        question, answer = entry["question"].strip(), str(entry["answer"]).strip()
        key = TASKS[file](question, answer)
        yield Keyed(f"reasoning_gym/{file}", key, Example("direct", question, answer), answer)
