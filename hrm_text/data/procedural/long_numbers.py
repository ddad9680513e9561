"""Ordering, continuing and spelling numbers over wider ranges; days and times."""

from __future__ import annotations

import random

from hrm_text.data.procedural.long_arithmetic import number_of_digits
from hrm_text.data.procedural.numbers import MOSTLY_DIRECT, ROMAN, comparison_steps
from hrm_text.data.procedural.registry import Problem, task
from hrm_text.data.procedural.vocabulary import words


def long_comparison_steps(a: int, b: int) -> str:
    """``4 digits > 3 digits`` where the lengths differ, else digit by digit from the left until two differ."""
    lengths = len(str(a)), len(str(b))
    if lengths[0] != lengths[1]:
        return f"{lengths[0]} digits {'<' if lengths[0] < lengths[1] else '>'} {lengths[1]} digits"
    return comparison_steps(a, b)


@task(
    "long_compare",
    chance=0.5,
    wordings=("Larger: {a} or {b}?", "Which is larger, {a} or {b}?", "Pick the larger of {a} and {b}."),
    conditions={"cot": 0.6, "synth,cot": 0.1, "noisy": 0.1, "direct": 0.2},
    sentence="The larger is {answer}.",
    steps=long_comparison_steps,
)
def long_compare(rng: random.Random) -> Problem:
    """The larger of two numbers of up to seven digits, which often begin alike."""
    a = number_of_digits(rng, 1, 7)
    if rng.random() < 0.5:
        same = rng.randint(0, len(str(a)) - 1)
        b = int(str(a)[:same] + "".join(rng.choices("0123456789", k=len(str(a)) - same)))
    else:
        b = number_of_digits(rng, 1, 7)
    b += a == b
    return Problem(f"{min(a, b)},{max(a, b)}", {"a": a, "b": b}, str(max(a, b)))


@task(
    "sort_numbers",
    chance=0.001,
    wordings=("Sort {numbers}", "Put these in ascending order: {numbers}", "Order from smallest to largest: {numbers}"),
    conditions=MOSTLY_DIRECT,
    sentence="In order they are {answer}.",
)
def sort_numbers(rng: random.Random) -> Problem:
    """Four to eight numbers below 1,000 in ascending order."""
    numbers = [rng.randint(0, 999) for _ in range(rng.randint(4, 8))]
    key = ", ".join(map(str, sorted(numbers)))
    return Problem(key, {"numbers": ", ".join(map(str, numbers))}, key)


@task(
    "sequence",
    chance=0.01,
    wordings=("Next: {terms}", "Continue the sequence {terms}", "Which number comes after {terms}?"),
    conditions=MOSTLY_DIRECT,
    sentence="The next number is {answer}.",
)
def sequence(rng: random.Random) -> Problem:
    """The number that continues six terms: constant or growing steps, powers, sums of two, two in turn."""
    kind = rng.randrange(5)
    a, b = rng.randint(0, 99), rng.randint(1, 30)
    if kind == 0:
        terms = [a + i * b for i in range(7)]
    elif kind == 1:
        growth = rng.randint(1, 5)
        terms = [a + i * b + growth * i * (i - 1) // 2 for i in range(7)]
    elif kind == 2:
        ratio = rng.choice((2, 3))
        terms = [(1 + a % 20) * ratio**i for i in range(7)]
    elif kind == 3:
        terms = [a, b]
        while len(terms) < 7:
            terms.append(terms[-1] + terms[-2])
    else:
        c, d = rng.randint(0, 99), rng.randint(1, 9)
        terms = [a + i // 2 * b if i % 2 == 0 else c + i // 2 * d for i in range(7)]
    shown = ", ".join(map(str, terms[:6]))
    return Problem(shown, {"terms": shown}, str(terms[6]))


@task(
    "from_roman",
    chance=0.001,
    wordings=("{numeral} in digits", "Which number is {numeral}?", "Read the Roman numeral {numeral}."),
    conditions=MOSTLY_DIRECT,
    sentence="The number is {answer}.",
)
def from_roman(rng: random.Random) -> Problem:
    """A Roman numeral below 2,000 in digits."""
    n = rng.randint(1, 1999)
    return Problem(str(n), {"numeral": "".join(ROMAN[p][n // 10**p % 10] for p in (3, 2, 1, 0))}, str(n))


SMALL = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = words("- - twenty thirty forty fifty sixty seventy eighty ninety")


def in_words(n: int) -> str:
    """A number below a million in English words."""
    if n < 20:
        return SMALL[n]
    if n < 100:
        return TENS[n // 10] + (f"-{SMALL[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{SMALL[n // 100]} hundred" + (f" and {in_words(n % 100)}" if n % 100 else "")
    return f"{in_words(n // 1000)} thousand" + (f" {in_words(n % 1000)}" if n % 1000 else "")


@task(
    "spell_number",
    chance=0.02,
    wordings=("{n} in words", "Write {n} in words.", "Spell out the number {n}."),
    conditions=MOSTLY_DIRECT,
    sentence="In words it is {answer}.",
)
def spell_number(rng: random.Random) -> Problem:
    """A number below a million in words."""
    n = number_of_digits(rng, 1, 6)
    return Problem(str(n), {"n": n}, in_words(n))


@task(
    "read_number",
    chance=0.02,
    wordings=("{words} in digits", "Write {words} in digits.", "Which number is {words}?"),
    conditions=MOSTLY_DIRECT,
    sentence="The number is {answer}.",
)
def read_number(rng: random.Random) -> Problem:
    """A number below a million, given in words, in digits."""
    n = number_of_digits(rng, 1, 6)
    return Problem(str(n), {"words": in_words(n)}, str(n))


DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def weekday_steps(day: str, n: int) -> str:
    """``10-7=3, Tuesday Wednesday Thursday,`` for ten days after Monday: whole weeks away, then day by day."""
    rest, start = n % 7, DAYS.index(day)
    names = [DAYS[(start + i) % 7] for i in range(1, rest + 1)]
    return " ".join([f"{n}-{n - rest}={rest},", *names]).rstrip(",") + ","


@task(
    "weekday",
    chance=0.15,
    wordings=(
        "{n} days after {day}?",
        "Today is {day}. Which day is it in {n} days?",
        "If it is {day}, what day comes {n} days later?",
    ),
    conditions={"cot": 0.6, "synth,cot": 0.1, "noisy,cot": 0.1, "direct": 0.2},
    sentence="The day is {answer}.",
    steps=weekday_steps,
)
def weekday(rng: random.Random) -> Problem:
    """The day of the week up to 400 days after another."""
    start, n = rng.randrange(7), rng.randint(1, 400)
    return Problem(f"{DAYS[start]}+{n}", {"day": DAYS[start], "n": n}, DAYS[(start + n) % 7])


def time_steps(time: str, minutes: int) -> str:
    """``50+35=85, 85-60=25, 9+1=10,`` for 35 minutes after 9:50: minutes first, then the hours they carry."""
    hour, minute = map(int, time.split(":"))
    total = minute + minutes
    steps = [f"{minute}+{minutes}={total},"]
    if carry := total // 60:
        steps += [f"{total}-{60 * carry}={total % 60},", f"{hour}+{carry}={hour + carry},"]
    if hour + carry >= 24:
        steps.append(f"{hour + carry}-24={hour + carry - 24},")
    return " ".join(steps)


@task(
    "later",
    chance=0.001,
    wordings=(
        "{minutes} minutes after {time}?",
        "It is {time}. What time is it {minutes} minutes later?",
        "{time} plus {minutes} minutes",
    ),
    conditions={"cot": 0.6, "synth,cot": 0.1, "noisy,cot": 0.1, "direct": 0.2},
    sentence="The time is {answer}.",
    steps=time_steps,
)
def later(rng: random.Random) -> Problem:
    """The time up to three hours after another."""
    start, minutes = rng.randrange(1440), rng.randint(1, 180)
    time, after = (f"{t // 60}:{t % 60:02d}" for t in (start, (start + minutes) % 1440))
    return Problem(f"{time}+{minutes}", {"time": time, "minutes": minutes}, after)
