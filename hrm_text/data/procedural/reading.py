"""Questions about a short passage, and about kinds of things: free answers, yes or no, one letter of four."""

from __future__ import annotations

import random
from typing import NamedTuple

from hrm_text.data.procedural.registry import Problem, task
from hrm_text.data.procedural.vocabulary import (
    CATEGORIES,
    COLOURS,
    FOODS,
    JOBS,
    NAMES,
    PETS,
    PLACES,
    SPORTS,
    THINGS,
    TOWNS,
)


class Relation(NamedTuple):
    """One kind of fact about a person."""

    values: tuple[str, ...]
    sentences: tuple[str, str]
    question: str
    claim: str
    """The words between a name and a value that claim the fact."""


RELATIONS = {
    "town": Relation(
        TOWNS, ("{name} lives in {value}.", "{name}'s home is in {value}."), "Where does {name} live?", "lives in"
    ),
    "job": Relation(
        JOBS, ("{name} works as a {value}.", "{name} is a {value}."), "What is {name}'s job?", "works as a"
    ),
    "colour": Relation(
        COLOURS,
        ("{name} has a {value} car.", "The car of {name} is {value}."),
        "Which colour is {name}'s car?",
        "has a car that is",
    ),
    "pet": Relation(
        PETS,
        ("{name} keeps a {value}.", "{name} has a {value} at home."),
        "Which animal does {name} keep?",
        "keeps a",
    ),
    "food": Relation(
        FOODS,
        ("{name} likes {value} best.", "The favourite dish of {name} is {value}."),
        "What does {name} like to eat best?",
        "likes to eat",
    ),
    "sport": Relation(
        SPORTS,
        ("{name} spends weekends on {value}.", "On Sundays {name} goes in for {value}."),
        "What does {name} do on Sundays?",
        "goes in for",
    ),
}

Fact = tuple[str, str, str]
"""A name, a relation, a value."""


def draw_facts(rng: random.Random) -> list[Fact]:
    """Three to six facts about two or three people, none told twice."""
    people = rng.sample(NAMES, rng.randint(2, 3))
    pairs = [(name, relation) for name in people for relation in RELATIONS]
    return [
        (name, relation, rng.choice(RELATIONS[relation].values))
        for name, relation in rng.sample(pairs, rng.randint(3, 6))
    ]


def passage_of(facts: list[Fact], rng: random.Random) -> str:
    """The facts as sentences, each in one of its wordings."""
    return " ".join(
        rng.choice(RELATIONS[relation].sentences).format(name=name, value=value) for name, relation, value in facts
    )


def canonical(facts: list[Fact]) -> str:
    """The facts as text, whatever their order and wording."""
    return "; ".join(sorted(" ".join(fact) for fact in facts))


ABOUT_A_PASSAGE = (
    "{passage}\n{question}",
    "Read and answer.\n{passage}\n{question}",
    "Question: {question}\nText: {passage}",
)
MOSTLY_DIRECT = {"direct": 0.75, "noisy": 0.1, "synth": 0.15}


@task(
    "reading",
    chance=0.25,
    wordings=ABOUT_A_PASSAGE,
    conditions=MOSTLY_DIRECT,
    sentence="According to the text it is {answer}.",
)
def reading(rng: random.Random) -> Problem:
    """What a passage says of a person."""
    facts = draw_facts(rng)
    name, relation, value = rng.choice(facts)
    question = RELATIONS[relation].question.format(name=name)
    return Problem(
        f"{canonical(facts)}? {name} {relation}", {"passage": passage_of(facts, rng), "question": question}, value
    )


@task(
    "who",
    chance=0.4,
    wordings=ABOUT_A_PASSAGE,
    conditions=MOSTLY_DIRECT,
    sentence="According to the text it is {answer}.",
)
def who(rng: random.Random) -> Problem:
    """Of which person a passage says something; it says so of one only."""
    facts = draw_facts(rng)
    name, relation, value = rng.choice(facts)
    facts = [fact for fact in facts if fact[1:] != (relation, value) or fact[0] == name]
    question = f"Who {RELATIONS[relation].claim} {value}?"
    return Problem(
        f"{canonical(facts)}? {relation} {value}", {"passage": passage_of(facts, rng), "question": question}, name
    )


@task("yes_no", chance=0.5, wordings=ABOUT_A_PASSAGE, conditions=MOSTLY_DIRECT, sentence="The answer is {answer}.")
def yes_no(rng: random.Random) -> Problem:
    """Whether a claim agrees with a passage."""
    facts = draw_facts(rng)
    name, relation, value = rng.choice(facts)
    true = rng.random() < 0.5
    claimed = value if true else rng.choice([other for other in RELATIONS[relation].values if other != value])
    fields = {
        "passage": passage_of(facts, rng),
        "question": f"True or not: {name} {RELATIONS[relation].claim} {claimed}.",
    }
    return Problem(f"{canonical(facts)}? {name} {relation} {claimed}", fields, "yes" if true else "no")


@task("where", chance=0.3, wordings=ABOUT_A_PASSAGE, conditions=MOSTLY_DIRECT, sentence="It is in the {answer}.")
def where(rng: random.Random) -> Problem:
    """Where a thing is after it was carried about; the last move counts."""
    things = rng.sample(THINGS, 2)
    moves = [(rng.choice(things), rng.choice(NAMES), rng.choice(PLACES)) for _ in range(rng.randint(2, 5))]
    asked = rng.choice(moves)[0]
    verbs = ("takes", "carries", "brings", "moves")
    passage = " ".join(f"{name} {rng.choice(verbs)} the {thing} to the {place}." for thing, name, place in moves)
    place = next(place for thing, _, place in reversed(moves) if thing == asked)
    key = "; ".join(f"{thing} {place}" for thing, _, place in moves)
    return Problem(f"{key}? {asked}", {"passage": passage, "question": f"Where is the {asked} now?"}, place)


@task(
    "choice",
    chance=0.25,
    wordings=(
        "Which of these is {kind}?\n{options}",
        "{options}\nWhich letter names {kind}?",
        "Choose {kind}.\n{options}",
    ),
    conditions=MOSTLY_DIRECT,
    sentence="The letter is {answer}.",
)
def choice(rng: random.Random) -> Problem:
    """The one of four things, by letter, that is of the kind asked for."""
    kind, *others = rng.sample(list(CATEGORIES), 4)
    words = [rng.choice(CATEGORIES[kind])] + [rng.choice(CATEGORIES[other]) for other in others]
    key = f"{kind}: {words[0]} | {' '.join(sorted(words[1:]))}"
    shuffled = rng.sample(words, 4)
    options = "\n".join(f"{letter}. {word}" for letter, word in zip("ABCD", shuffled, strict=True))
    return Problem(key, {"kind": kind, "options": options}, "ABCD"[shuffled.index(words[0])])


@task(
    "odd_one_out",
    chance=0.25,
    wordings=(
        "Odd one out: {words}",
        "Which does not belong: {words}?",
        "Three belong together, which does not? {words}",
    ),
    conditions=MOSTLY_DIRECT,
    sentence="The odd one is {answer}.",
)
def odd_one_out(rng: random.Random) -> Problem:
    """The one of four things that is of another kind than the rest."""
    kind, other = rng.sample(list(CATEGORIES), 2)
    alike, odd = rng.sample(CATEGORIES[kind], 3), rng.choice(CATEGORIES[other])
    words = rng.sample([*alike, odd], 4)
    return Problem(f"{odd} | {' '.join(sorted(alike))}", {"words": ", ".join(words)}, odd)
