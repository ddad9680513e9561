"""Arithmetic over wider ranges, with the working written out."""

from __future__ import annotations

import random

from hrm_text.data.procedural.arithmetic import addition_steps, subtraction_steps
from hrm_text.data.procedural.registry import Problem, task

MOSTLY_STEPS = {"cot": 0.75, "noisy,cot": 0.08, "synth,cot": 0.07, "direct": 0.1}


def number_of_digits(rng: random.Random, fewest: int, most: int) -> int:
    """A number whose count of digits is uniform over a range."""
    digits = rng.randint(fewest, most)
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


@task(
    "long_add",
    chance=0.01,
    wordings=("{a} + {b}", "What is {a} + {b}?", "Add {a} and {b}.", "Calculate the sum of {a} and {b}."),
    conditions=MOSTLY_STEPS,
    sentence="The sum is {answer}.",
    steps=addition_steps,
)
def long_add(rng: random.Random) -> Problem:
    """Sum of two numbers of up to six digits."""
    a, b = number_of_digits(rng, 1, 6), number_of_digits(rng, 2, 6)
    return Problem(f"{min(a, b)}+{max(a, b)}", {"a": a, "b": b}, str(a + b))


@task(
    "long_sub",
    chance=0.01,
    wordings=("{a} - {b}", "What is {a} - {b}?", "Take {b} from {a}.", "How much more is {a} than {b}?"),
    conditions=MOSTLY_STEPS,
    sentence="The difference is {answer}.",
    steps=subtraction_steps,
)
def long_sub(rng: random.Random) -> Problem:
    """Difference of two numbers of up to six digits, not negative."""
    a, b = number_of_digits(rng, 1, 6), number_of_digits(rng, 2, 6)
    a, b = max(a, b), min(a, b)
    return Problem(f"{a}-{b}", {"a": a, "b": b}, str(a - b))


def multiplication_steps(a: int, b: int) -> str:
    """``47*30=1410, 47*8=376, 1410+376=1786,`` for 47 * 38: one product per digit of b, then their running sum."""
    products = [int(digit) * 10**place for place, digit in zip(range(len(str(b)) - 1, -1, -1), str(b), strict=True)]
    parts = [part for part in products if part]
    steps = [f"{a}*{part}={a * part}," for part in parts]
    total = a * parts[0]
    for part in parts[1:]:
        steps.append(f"{total}+{a * part}={total + a * part},")
        total += a * part
    return " ".join(steps)


@task(
    "multiply",
    chance=0.03,
    wordings=("{a} * {b}", "What is {a} times {b}?", "Multiply {a} by {b}."),
    conditions=MOSTLY_STEPS,
    sentence="The product is {answer}.",
    steps=multiplication_steps,
)
def multiply(rng: random.Random) -> Problem:
    """Product of a number of up to four digits and one of up to two."""
    a, b = number_of_digits(rng, 1, 4), rng.randint(2, 99)
    return Problem(f"{min(a, b)}*{max(a, b)}", {"a": a, "b": b}, str(a * b))


def division_steps(a: int, b: int) -> str:
    """``9/7=1 r2, 26/7=3 r5,`` for 96 / 7: long division, a digit brought down at each step."""
    steps, rest = [], 0
    for digit in str(a):
        current = rest * 10 + int(digit)
        rest = current % b
        steps.append(f"{current}/{b}={current // b} r{rest},")
    return " ".join(steps)


@task(
    "divide",
    chance=0.01,
    wordings=("{a} / {b}", "Divide {a} by {b}, with remainder.", "What is {a} divided by {b}?"),
    conditions=MOSTLY_STEPS,
    sentence="The quotient and remainder are {answer}.",
    steps=division_steps,
)
def divide(rng: random.Random) -> Problem:
    """Quotient and remainder of a number of up to five digits by one of one digit."""
    a, b = number_of_digits(rng, 2, 5), rng.randint(2, 9)
    return Problem(f"{a}/{b}", {"a": a, "b": b}, f"{a // b} r{a % b}")


def running_sum_steps(terms: str) -> str:
    """``12+7=19, 19+30=49,`` for 12 + 7 + 30."""
    numbers = [int(term) for term in terms.split(" + ")]
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number},")
        total += number
    return " ".join(steps)


@task(
    "sum_list",
    chance=0.01,
    wordings=("{terms}", "What is {terms}?", "Add up {terms}."),
    conditions=MOSTLY_STEPS,
    sentence="The total is {answer}.",
    steps=running_sum_steps,
)
def sum_list(rng: random.Random) -> Problem:
    """Sum of three to six numbers below 100."""
    numbers = [rng.randint(1, 99) for _ in range(rng.randint(3, 6))]
    key = "+".join(str(number) for number in sorted(numbers))
    return Problem(key, {"terms": " + ".join(map(str, numbers))}, str(sum(numbers)))
