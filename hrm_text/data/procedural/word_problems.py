"""Short stories that end in a number, with the sums that lead to it."""

from __future__ import annotations

import random
from collections.abc import Callable

from hrm_text.data.procedural.registry import Problem, task
from hrm_text.data.procedural.vocabulary import NAMES, PLACES, THINGS

Story = tuple[str, str, str, int]
"""Its numbers as text without wording, its text, its sums, its answer."""


def given_away(rng: random.Random, name: str, thing: str) -> Story:
    """One has some, gets some and gives some away."""
    a, b = rng.randint(5, 60), rng.randint(2, 40)
    c = rng.randint(1, a + b - 1)
    text = rng.choice(
        (
            f"{name} has {a} {thing}s, finds {b} more and gives {c} away. How many {thing}s are left?",
            f"In the morning {name} owns {a} {thing}s. {name} buys {b} and later loses {c}. How many {thing}s remain?",
        )
    )
    return f"{a}+{b}-{c}", text, f"{a}+{b}={a + b}, {a + b}-{c}={a + b - c},", a + b - c


def packed(rng: random.Random, name: str, thing: str) -> Story:
    """Boxes of equal size and some loose."""
    a, b, c = rng.randint(2, 12), rng.randint(2, 12), rng.randint(1, 20)
    text = rng.choice(
        (
            f"{name} has {a} boxes with {b} {thing}s each and {c} loose {thing}s. How many {thing}s are there?",
            f"There are {c} {thing}s on a table and {b} {thing}s in each of {a} bags. How many are there in all?",
        )
    )
    return f"{a}*{b}+{c}", text, f"{a}*{b}={a * b}, {a * b}+{c}={a * b + c},", a * b + c


def shared(rng: random.Random, name: str, thing: str) -> Story:
    """Some bought, then shared equally."""
    people, each = rng.randint(2, 9), rng.randint(2, 12)
    a = rng.randint(1, people * each - 1)
    b = people * each - a
    text = rng.choice(
        (
            f"{name} has {a} {thing}s and gets {b} more. {people} friends share them equally. How many does each get?",
            f"{a} {thing}s and {b} {thing}s are dealt out evenly to {people} children. How many does each child have?",
        )
    )
    return f"({a}+{b})/{people}", text, f"{a}+{b}={a + b}, {a + b}/{people}={each},", each


def change(rng: random.Random, name: str, thing: str) -> Story:
    """Money back from a purchase."""
    price, count = rng.randint(2, 15), rng.randint(2, 9)
    paid = rng.choice([note for note in (20, 50, 100, 200) if note >= price * count])
    text = rng.choice(
        (
            f"A {thing} costs {price} euros. {name} buys {count} and pays with {paid} euros. How much comes back?",
            f"{name} pays {paid} euros for {count} {thing}s at {price} euros each. How many euros are the change?",
        )
    )
    total = price * count
    return f"{paid}-{count}*{price}", text, f"{count}*{price}={total}, {paid}-{total}={paid - total},", paid - total


def compared(rng: random.Random, name: str, thing: str) -> Story:
    """One has more than another; the total of both."""
    a, b = rng.randint(3, 50), rng.randint(2, 30)
    other = rng.choice([someone for someone in NAMES if someone != name])
    text = rng.choice(
        (
            f"{name} has {a} {thing}s. {other} has {b} more than {name}. How many have they together?",
            f"{other} owns {b} {thing}s more than {name}, who owns {a}. How many {thing}s do both own?",
        )
    )
    return f"{a}+({a}+{b})", text, f"{a}+{b}={a + b}, {a}+{a + b}={2 * a + b},", 2 * a + b


def travelled(rng: random.Random, name: str, thing: str) -> Story:
    """A way in two parts at two speeds."""
    speed, hours, second, more = rng.randint(3, 20), rng.randint(2, 6), rng.randint(3, 20), rng.randint(1, 5)
    text = rng.choice(
        (
            f"{name} rides {hours} hours at {speed} km/h, then {more} hours at {second} km/h. How many km is that?",
            f"After {hours} hours at {speed} km/h and {more} hours at {second} km/h, how many km has {name} gone?",
        )
    )
    first, last = speed * hours, second * more
    sums = f"{hours}*{speed}={first}, {more}*{second}={last}, {first}+{last}={first + last},"
    return f"{hours}*{speed}+{more}*{second}", text, sums, first + last


def halved(rng: random.Random, name: str, thing: str) -> Story:
    """Half of them leave, then some come."""
    half, b = rng.randint(2, 50), rng.randint(1, 40)
    place = rng.choice(PLACES)
    text = rng.choice(
        (
            f"{2 * half} {thing}s lie in the {place}. {name} takes half and puts {b} back. How many are there now?",
            f"Of the {2 * half} {thing}s in the {place} {name} removes half, then adds {b}. How many are left there?",
        )
    )
    return f"{2 * half}/2+{b}", text, f"{2 * half}/2={half}, {half}+{b}={half + b},", half + b


STORIES: tuple[Callable[[random.Random, str, str], Story], ...] = (
    given_away,
    packed,
    shared,
    change,
    compared,
    travelled,
    halved,
)


def steps_as_told(story: str, sums: str) -> str:
    """The sums of the story, which came with it."""
    return sums


@task(
    "word_problem",
    chance=0.03,
    wordings=("{story}", "Solve: {story}", "{story} Answer with a number."),
    conditions={"cot": 0.6, "synth,cot": 0.15, "noisy,cot": 0.1, "direct": 0.15},
    sentence="The answer is {answer}.",
    steps=steps_as_told,
)
def word_problem(rng: random.Random) -> Problem:
    """A story of two or three sums; names, things and wording do not count as a new problem."""
    tell = rng.choice(STORIES)
    numbers, text, sums, answer = tell(rng, rng.choice(NAMES), rng.choice(THINGS))
    return Problem(f"{tell.__name__} {numbers}", {"story": text, "sums": sums}, str(answer))
