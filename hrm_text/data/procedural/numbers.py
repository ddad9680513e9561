"""Reading, ordering and continuing numbers."""

from __future__ import annotations

import random

from hrm_text.data.procedural.arithmetic import addition_steps, subtraction_steps
from hrm_text.data.procedural.registry import Problem, task

MOSTLY_DIRECT = {"direct": 0.8, "noisy": 0.1, "synth": 0.1}
STEP_BY_STEP = {"cot": 0.7, "noisy,cot": 0.08, "synth,cot": 0.06, "direct": 0.16}


def comparison_steps(a: int, b: int) -> str:
    """``4=4 7<9`` for 47 and 49: digit by digit from the left until two differ."""
    steps = []
    for x, y in zip(str(a), str(b), strict=True):
        steps.append(f"{x}{'=' if x == y else '<' if x < y else '>'}{y}")
        if x != y:
            break
    return " ".join(steps)


@task(
    "compare",
    chance=0.5,
    wordings=("Larger: {a} or {b}?", "Which is larger, {a} or {b}?", "Pick the larger of {a} and {b}."),
    conditions=STEP_BY_STEP,
    sentence="The larger is {answer}.",
    steps=comparison_steps,
)
def compare(rng: random.Random) -> Problem:
    """The larger of two numbers of two digits."""
    a, b = 10 + int(rng.random() * 90), 10 + int(rng.random() * 89)
    b += b >= a  # never equal
    return Problem(f"{min(a, b)},{max(a, b)}", {"a": a, "b": b}, str(max(a, b)))


@task(
    "parity",
    chance=0.5,
    wordings=("Is {n} even or odd?", "Even or odd: {n}", "Parity of {n}?"),
    conditions=MOSTLY_DIRECT,
    sentence="The number is {answer}.",
)
def parity(rng: random.Random) -> Problem:
    """Whether a number below 10,000 is even or odd."""
    n = int(rng.random() * 10_000)
    return Problem(str(n), {"n": n}, "odd" if n % 2 else "even")


def continuation_steps(terms: str) -> str:
    """``+7, 8+7=15 c1, 3+0+1=4,`` for 17 24 31 38: the step between the terms, then the last term and the step."""
    numbers = [int(term) for term in terms.split()]
    step = numbers[-1] - numbers[-2]
    working = addition_steps(numbers[-1], step) if step > 0 else subtraction_steps(numbers[-1], -step)
    return f"{step:+d}, {working}"


@task(
    "next",
    chance=0.02,
    wordings=("Next: {terms}", "Continue {terms}", "What comes after {terms}?"),
    conditions=STEP_BY_STEP,
    sentence="The next number is {answer}.",
    steps=continuation_steps,
)
def next_term(rng: random.Random) -> Problem:
    """The number that continues four terms with a constant step up or down."""
    start, step = int(rng.random() * 60), 1 + int(rng.random() * 9)
    terms = [start + i * step for i in range(5)]
    if rng.random() < 0.5:
        terms.reverse()
    shown = " ".join(map(str, terms[:4]))
    return Problem(shown, {"terms": shown}, str(terms[4]))


@task(
    "max",
    chance=0.35,
    wordings=("Max of {digits}", "Largest of {digits}?", "Find the largest: {digits}"),
    conditions=MOSTLY_DIRECT,
    sentence="The largest is {answer}.",
)
def largest(rng: random.Random) -> Problem:
    """The largest of four digits."""
    shown = " ".join(f"{int(rng.random() * 10_000):04d}")
    return Problem(shown, {"digits": shown}, max(shown))


@task(
    "sort",
    chance=0.01,
    wordings=("Sort {digits}", "Put {digits} in order.", "Smallest first: {digits}"),
    conditions=MOSTLY_DIRECT,
    sentence="In order it is {answer}.",
)
def sort(rng: random.Random) -> Problem:
    """Four digits in ascending order."""
    shown = " ".join(f"{int(rng.random() * 10_000):04d}")
    return Problem(shown, {"digits": shown}, " ".join(sorted(shown.split())))


ROMAN = (
    ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX"),
    ("", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC"),
    ("", "C", "CC", "CCC", "CD", "D", "DC", "DCC", "DCCC", "CM"),
    ("", "M"),
)
"""The letters of each digit, by place from the units."""


@task(
    "roman",
    chance=0.001,
    wordings=("Roman: {n}", "{n} in Roman numerals?", "Write {n} in Roman numerals."),
    conditions=MOSTLY_DIRECT,
    sentence="The numeral is {answer}.",
)
def roman(rng: random.Random) -> Problem:
    """A number below 2,000 in Roman numerals."""
    n = 1 + int(rng.random() * 1999)
    return Problem(str(n), {"n": n}, "".join(ROMAN[place][n // 10**place % 10] for place in (3, 2, 1, 0)))


@task(
    "clock",
    chance=0.001,
    wordings=("{time} as am or pm", "12-hour: {time}", "Read {time} on a 12-hour clock."),
    conditions=MOSTLY_DIRECT,
    sentence="The time is {answer}.",
)
def clock(rng: random.Random) -> Problem:
    """A time of the 24-hour clock on the 12-hour clock."""
    hour, minute = divmod(int(rng.random() * 1440), 60)
    time = f"{hour:02d}:{minute:02d}"
    return Problem(time, {"time": time}, f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}")
