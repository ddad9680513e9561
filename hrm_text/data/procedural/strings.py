"""Letters and words: made-up words, so that there are many and none is known by heart.

The words are shown spelled, ``k a t o``: a letter is a token then, as a digit is. A byte-pair tokenizer would otherwise
cut random words at random places, and a small model needs twice the training to see through it.
"""

from __future__ import annotations

import random

from hrm_text.data.procedural.registry import Problem, task

VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
LETTERS = VOWELS + CONSONANTS
LETTERS_AS_IN_TEXT = VOWELS * 14 + CONSONANTS * 5
"""Two letters in five are vowels."""
MOSTLY_DIRECT = {"direct": 0.8, "noisy": 0.1, "synth": 0.1}


def made_up_word(rng: random.Random, shortest: int, longest: int) -> str:
    """Random letters, as many vowels among them as in English text."""
    return "".join(rng.choices(LETTERS_AS_IN_TEXT, k=shortest + int(rng.random() * (longest - shortest + 1))))


def spelled(word: str) -> str:
    """A word with spaces between its letters."""
    return " ".join(word)


@task(
    "reverse",
    chance=0.001,
    wordings=("Reverse {word}", "Write {word} backwards.", "Spell {word} from the end."),
    conditions=MOSTLY_DIRECT,
    sentence="Backwards it is {answer}.",
)
def reverse(rng: random.Random) -> Problem:
    """A word backwards."""
    word = made_up_word(rng, 3, 5)
    return Problem(word, {"word": spelled(word)}, spelled(word[::-1]))


@task(
    "upper",
    chance=0.001,
    wordings=("Upper case {word}", "Write {word} in capitals.", "Capitals: {word}"),
    conditions=MOSTLY_DIRECT,
    sentence="In capitals it is {answer}.",
)
def upper(rng: random.Random) -> Problem:
    """A word in capitals."""
    word = made_up_word(rng, 3, 5)
    return Problem(word, {"word": spelled(word)}, spelled(word.upper()))


@task(
    "vowels",
    chance=0.35,
    wordings=("Vowels in {word}?", "Count the vowels of {word}.", "How many vowels has {word}?"),
    conditions=MOSTLY_DIRECT,
    sentence="The count is {answer}.",
)
def vowels(rng: random.Random) -> Problem:
    """How many vowels a word has."""
    word = made_up_word(rng, 3, 5)
    return Problem(word, {"word": spelled(word)}, str(sum(letter in VOWELS for letter in word)))


@task(
    "strip_vowels",
    chance=0.05,
    wordings=("Drop vowels: {word}", "Write {word} without vowels.", "Remove the vowels of {word}."),
    conditions=MOSTLY_DIRECT,
    sentence="What remains is {answer}.",
)
def strip_vowels(rng: random.Random) -> Problem:
    """A word without its vowels, of which at least one consonant remains."""
    word = made_up_word(rng, 3, 5)
    rest = "".join([letter for letter in word if letter not in VOWELS])
    if not rest:
        word, rest = word + "t", "t"
    return Problem(word, {"word": spelled(word)}, spelled(rest))


@task(
    "ends",
    chance=0.01,
    wordings=("Ends of {word}", "First and last letter of {word}?", "Give the outer letters of {word}."),
    conditions=MOSTLY_DIRECT,
    sentence="The letters are {answer}.",
)
def ends(rng: random.Random) -> Problem:
    """The first and the last letter of a word."""
    word = made_up_word(rng, 3, 6)
    return Problem(word, {"word": spelled(word)}, f"{word[0]} {word[-1]}")


@task(
    "count_letter",
    chance=0.34,
    wordings=("Count {letter} in {word}", "How many {letter} are in {word}?", "{letter} in {word}: how many?"),
    conditions=MOSTLY_DIRECT,
    sentence="The count is {answer}.",
)
def count_letter(rng: random.Random) -> Problem:
    """How often a letter occurs in a word, none to three times with equal odds for the first three."""
    letter = LETTERS[int(rng.random() * 26)]
    others = [other for other in made_up_word(rng, 3, 5) if other != letter]
    for _ in range(int(rng.random() * 3)):
        others.insert(int(rng.random() * (len(others) + 1)), letter)
    word = "".join(others) or letter
    return Problem(f"{letter} {word}", {"letter": letter, "word": spelled(word)}, str(word.count(letter)))


@task(
    "contains",
    chance=0.5,
    wordings=("Is {letter} in {word}?", "Has {word} a {letter}?", "Does {letter} occur in {word}?"),
    conditions=MOSTLY_DIRECT,
    sentence="The answer is {answer}.",
)
def contains(rng: random.Random) -> Problem:
    """Whether a letter occurs in a word."""
    word = made_up_word(rng, 3, 6)
    letter = word[int(rng.random() * len(word))]
    if rng.random() < 0.5:
        while letter in word:
            letter = LETTERS[int(rng.random() * 26)]
    return Problem(f"{letter} {word}", {"letter": letter, "word": spelled(word)}, "yes" if letter in word else "no")


@task(
    "repeat",
    chance=0.001,
    wordings=("Repeat {word} {n} times", "Write {word} {n} times.", "{n} times {word}"),
    conditions=MOSTLY_DIRECT,
    sentence="The line is {answer}.",
)
def repeat(rng: random.Random) -> Problem:
    """A short word written two to four times."""
    word, n = made_up_word(rng, 2, 4), 2 + int(rng.random() * 3)
    return Problem(f"{n} {word}", {"word": spelled(word), "n": n}, ", ".join([spelled(word)] * n))


@task(
    "swap",
    chance=0.001,
    wordings=("Swap {first}, {second}", "Exchange the words: {first}, {second}", "Turn around {first}, {second}"),
    conditions=MOSTLY_DIRECT,
    sentence="Swapped it is {answer}.",
)
def swap(rng: random.Random) -> Problem:
    """Two words in the other order."""
    first, second = made_up_word(rng, 2, 4), made_up_word(rng, 2, 4)
    key = " ".join(sorted((first, second)))
    return Problem(key, {"first": spelled(first), "second": spelled(second)}, f"{spelled(second)}, {spelled(first)}")
