"""Longer made-up words, and lists of them."""

from __future__ import annotations

import random

from hrm_text.data.procedural.registry import Problem, task
from hrm_text.data.procedural.strings import LETTERS, MOSTLY_DIRECT, VOWELS, made_up_word


def spelling(word: str) -> str:
    """``k a d`` for kad: the letters one by one, before the answer is put together."""
    return " ".join(word) + ","


@task(
    "long_reverse",
    chance=0.001,
    wordings=("Reverse {word}", "Write {word} backwards.", "Spell {word} from the end."),
    conditions={"cot": 0.4, "direct": 0.4, "noisy": 0.1, "synth": 0.1},
    sentence="Backwards it is {answer}.",
    steps=spelling,
)
def long_reverse(rng: random.Random) -> Problem:
    """A word of up to ten letters backwards."""
    word = made_up_word(rng, 4, 10)
    return Problem(word, {"word": word}, word[::-1])


@task(
    "long_count_letter",
    chance=0.25,
    wordings=("Count {letter} in {word}", "How many {letter} are in {word}?", "How often does {word} have {letter}?"),
    conditions=MOSTLY_DIRECT,
    sentence="The count is {answer}.",
)
def long_count_letter(rng: random.Random) -> Problem:
    """How often a letter occurs in a word of up to 15 letters."""
    letter = LETTERS[int(rng.random() * 26)]
    word = list(made_up_word(rng, 6, 11))
    for _ in range(rng.randint(0, 4)):
        word.insert(rng.randint(0, len(word)), letter)
    shown = "".join(word)
    return Problem(f"{letter} {shown}", {"letter": letter, "word": shown}, str(shown.count(letter)))


@task(
    "nth_letter",
    chance=0.1,
    wordings=("Letter {n} of {word}", "What is letter number {n} of {word}?", "Which letter of {word} has place {n}?"),
    conditions=MOSTLY_DIRECT,
    sentence="The letter is {answer}.",
)
def nth_letter(rng: random.Random) -> Problem:
    """The letter at a place, counted from 1, in a word of up to ten letters."""
    word = made_up_word(rng, 4, 10)
    n = rng.randint(1, len(word))
    return Problem(f"{n} {word}", {"n": n, "word": word}, word[n - 1])


@task(
    "replace",
    chance=0.001,
    wordings=(
        "{old} to {new} in {word}",
        "Replace {old} by {new} in {word}.",
        "Write {word} with {new} for every {old}.",
    ),
    conditions=MOSTLY_DIRECT,
    sentence="The word is {answer}.",
)
def replace(rng: random.Random) -> Problem:
    """A word of up to ten letters with one letter replaced by another wherever it stands."""
    word = made_up_word(rng, 4, 10)
    old, new = rng.choice(word), rng.choice(LETTERS)
    return Problem(f"{old}>{new} {word}", {"old": old, "new": new, "word": word}, word.replace(old, new))


@task(
    "palindrome",
    chance=0.5,
    wordings=("Is {word} a palindrome?", "Does {word} read the same backwards?", "Palindrome or not: {word}"),
    conditions=MOSTLY_DIRECT,
    sentence="The answer is {answer}.",
)
def palindrome(rng: random.Random) -> Problem:
    """Whether a word reads the same backwards; where it does not, one letter breaks it."""
    half = made_up_word(rng, 2, 5)
    word = list(half + half[::-1][rng.randint(0, 1) :])
    if rng.random() < 0.5:
        place = rng.randrange(len(half) - 1)
        word[place] = rng.choice([letter for letter in LETTERS if letter != word[place]])
    shown = "".join(word)
    return Problem(shown, {"word": shown}, "yes" if shown == shown[::-1] else "no")


@task(
    "sort_words",
    chance=0.001,
    wordings=("Sort {words}", "Put in alphabetical order: {words}", "Order these as in a dictionary: {words}"),
    conditions=MOSTLY_DIRECT,
    sentence="In order they are {answer}.",
)
def sort_words(rng: random.Random) -> Problem:
    """Three to six words in alphabetical order."""
    words = [made_up_word(rng, 3, 6) for _ in range(rng.randint(3, 6))]
    key = " ".join(sorted(words))
    return Problem(key, {"words": " ".join(words)}, key)


@task(
    "initials",
    chance=0.001,
    wordings=("Initials of {words}", "Write the first letters of {words}.", "Which letters begin {words}?"),
    conditions=MOSTLY_DIRECT,
    sentence="The letters are {answer}.",
)
def initials(rng: random.Random) -> Problem:
    """The first letters of three to seven words."""
    words = [made_up_word(rng, 2, 6) for _ in range(rng.randint(3, 7))]
    shown = " ".join(words)
    return Problem(shown, {"words": shown}, "".join(word[0] for word in words).upper())


@task(
    "vowels_first",
    chance=0.001,
    wordings=(
        "Vowels first: {word}",
        "Write {word} with its vowels in front.",
        "Move the vowels of {word} to the front.",
    ),
    conditions=MOSTLY_DIRECT,
    sentence="The result is {answer}.",
)
def vowels_first(rng: random.Random) -> Problem:
    """A word's vowels and then its consonants, both in their order."""
    word = made_up_word(rng, 4, 9)
    return Problem(word, {"word": word}, "".join(sorted(word, key=lambda letter: letter not in VOWELS)))


@task(
    "in_both",
    chance=0.02,
    wordings=(
        "In both: {first} | {second}",
        "Which words are in both lists? {first} | {second}",
        "Common words of {first} | {second}",
    ),
    conditions=MOSTLY_DIRECT,
    sentence="The words are {answer}.",
)
def in_both(rng: random.Random) -> Problem:
    """The one to three words that two lists share, in alphabetical order."""
    words = sorted({made_up_word(rng, 3, 5) for _ in range(rng.randint(6, 9))})
    rng.shuffle(words)
    shared, rest = words[: rng.randint(1, 3)], words[3:]
    cut = len(rest) // 2
    first, second = shared + rest[:cut], shared + rest[cut:]
    rng.shuffle(first)
    rng.shuffle(second)
    key = " ".join(sorted((" ".join(sorted(first)), " ".join(sorted(second)))))
    return Problem(key, {"first": " ".join(first), "second": " ".join(second)}, " ".join(sorted(shared)))
