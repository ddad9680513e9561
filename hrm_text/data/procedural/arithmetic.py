"""Sums and differences, written out by columns from the units."""

from __future__ import annotations

import random

from hrm_text.data.procedural.registry import Problem, task


def columns(number: int, width: int) -> list[int]:
    """The digits of a number from the units up, ``width`` of them."""
    return [number // 10**i % 10 for i in range(width)]


def addition_steps(a: int, b: int) -> str:
    """``7+8=15 c1, 4+3+1=8,`` for 47 + 38: each column with the carry into it, then the carry out of it."""
    width = len(str(max(a, b)))
    steps, carry = [], 0
    for i, (x, y) in enumerate(zip(columns(a, width), columns(b, width), strict=True)):
        total = x + y + carry
        column = f"{x}+{y}={total}" if i == 0 else f"{x}+{y}+{carry}={total}"
        carry = total // 10
        steps.append(f"{column} c{carry}," if i < width - 1 else f"{column},")
    return " ".join(steps)


def subtraction_steps(a: int, b: int) -> str:
    """``15-7=8 b1, 4-1-1=2,`` for 45 - 17: each column with ten added where it borrows, then the borrow."""
    width = len(str(a))
    steps, borrow = [], 0
    for i, (x, y) in enumerate(zip(columns(a, width), columns(b, width), strict=True)):
        borrowed = x - y - borrow < 0
        top = x + 10 * borrowed
        column = f"{top}-{y}={top - y}" if i == 0 else f"{top}-{y}-{borrow}={top - y - borrow}"
        borrow = int(borrowed)
        steps.append(f"{column} b{borrow}," if i < width - 1 else f"{column},")
    return " ".join(steps)


SHARES_OF_SUMS = {"cot": 0.70, "noisy,cot": 0.08, "synth,cot": 0.06, "direct": 0.16}
"""Only step-by-step sums are learned by a small model: 92 % held-out against 6 % for bare answers."""


@task(
    "add",
    chance=0.02,
    wordings=("{a} + {b}", "What is {a} + {b}?", "Add {a} and {b}."),
    conditions=SHARES_OF_SUMS,
    sentence="The sum is {answer}.",
    steps=addition_steps,
)
def add(rng: random.Random) -> Problem:
    """Sum of two numbers of two digits."""
    a, b = 10 + int(rng.random() * 90), 10 + int(rng.random() * 90)
    return Problem(f"{min(a, b)}+{max(a, b)}", {"a": a, "b": b}, str(a + b))


@task(
    "sub",
    chance=0.03,
    wordings=("{a} - {b}", "What is {a} - {b}?", "Take {b} from {a}."),
    conditions=SHARES_OF_SUMS,
    sentence="The difference is {answer}.",
    steps=subtraction_steps,
)
def sub(rng: random.Random) -> Problem:
    """Difference of two numbers of two digits, not negative."""
    a, b = 10 + int(rng.random() * 90), 10 + int(rng.random() * 90)
    a, b = max(a, b), min(a, b)
    return Problem(f"{a}-{b}", {"a": a, "b": b}, str(a - b))
