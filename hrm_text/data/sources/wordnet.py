"""WordNet 3.0 (Fellbaum 1998): definitions, kinds and opposites, read from the files of Debian's ``wordnet-base``."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hrm_text.contracts import Example
from hrm_text.data.sources.registry import Keyed, debian_file, source

PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
"""The parts of speech, with the endings of their files."""


class Synset(NamedTuple):
    """Words of one meaning."""

    key: str
    """Part of speech and byte offset, such as ``n00001740``: unique."""
    words: list[str]
    definition: str
    kinds: list[str]
    """Keys of the synsets it is a kind of."""
    opposites: list[str]
    """Keys of the synsets that hold the antonym of its first word."""


def folder() -> Path:
    """Where the database lies: WNSEARCHDIR as WordNet's own programs read it, or Debian's place."""
    return Path(os.environ.get("WNSEARCHDIR", "/usr/share/wordnet"))


def parse(line: str) -> Synset:
    """One line of a data file, as described in wndb(5WN)."""
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    part = fields[2].replace("s", "a")  # a satellite adjective lies in the file of the adjectives
    count = int(fields[3], 16)
    words = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
    pointers = fields[5 + 2 * count :]
    kinds, opposites = [], []
    for i in range(0, 4 * int(fields[4 + 2 * count]), 4):
        symbol, offset, target_part, words_joined = pointers[i : i + 4]
        if symbol in ("@", "@i"):
            kinds.append(target_part + offset)
        elif symbol == "!" and words_joined == "0101":  # from the first word to the first word
            opposites.append(target_part.replace("s", "a") + offset)
    definition = re.split(r'; "|;\s*$', gloss.strip())[0].strip()
    return Synset(part + fields[0], words, definition, kinds, opposites)


def read_synsets(database: Path) -> dict[str, Synset]:
    """All 117,659 synsets by key; the lines of the licence, which begin with two spaces, are passed over."""
    found = {}
    for ending in PARTS.values():
        with (database / f"data.{ending}").open(encoding="utf-8") as lines:
            for line in lines:
                if not line.startswith("  "):
                    synset = parse(line)
                    found[synset.key] = synset
    return found


def ask(
    file: str, synset: Synset, synsets: dict[str, Synset], nouns: list[Synset], rng: random.Random
) -> tuple[str, str] | None:
    """A question of one file about a synset and its answer, or None if the synset has none.

    ``nouns`` are those that are of some kind: their kinds serve as the wrong ones.
    """
    word = synset.words[0]
    name = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}[synset.key[0]]
    if file == "definition":
        wording = rng.choice(
            ("Define the {name} {word}.", "What does the {name} {word} mean?", "Meaning of {word} ({name})?")
        )
        return wording.format(name=name, word=word), synset.definition
    if file == "word":
        wording = rng.choice(
            ("Which {name} means: {d}?", "Name the {name}: {d}", "What is the word ({name}) for: {d}?")
        )
        return wording.format(name=name, d=synset.definition), word
    if file == "kind" and synset.kinds:
        wording = rng.choice(
            ("What kind of thing is {word}?", "{word} is a kind of what?", "Which class does {word} belong to?")
        )
        return wording.format(word=word), synsets[synset.kinds[0]].words[0]
    if file == "is_a" and synset.kinds and synset.key[0] == "n":
        true = rng.random() < 0.5
        other = synsets[synset.kinds[0]] if true else _of_another_kind(synset, synsets, nouns, rng)
        wording = rng.choice(
            ("Is {word} a kind of {other}?", "Does {word} belong to the class {other}?", "{word}: a {other}?")
        )
        return wording.format(word=word, other=other.words[0]), "yes" if true else "no"
    if file == "opposite" and synset.opposites and synset.opposites[0] in synsets:
        wording = rng.choice(
            ("What is the opposite of {word}?", "Opposite of {word}:", "Which word means the contrary of {word}?")
        )
        return wording.format(word=word), synsets[synset.opposites[0]].words[0]
    return None


def _of_another_kind(synset: Synset, synsets: dict[str, Synset], nouns: list[Synset], rng: random.Random) -> Synset:
    """A kind that some other noun belongs to and that is not among all the kinds above this one."""
    above, queue = {synset.key}, list(synset.kinds)
    while queue:
        key = queue.pop()
        if key not in above:
            above.add(key)
            queue.extend(synsets[key].kinds)
    while True:
        kind = rng.choice(nouns).kinds[0]
        if kind not in above:
            return synsets[kind]


def pair_key(file: str, synset: Synset) -> str:
    """The synset; of two opposites the one that comes first, since either question gives the other's answer away."""
    return min(synset.key, *synset.opposites) if file == "opposite" else synset.key


@source(
    "wordnet",
    licence="WordNet",
    home="https://wordnet.princeton.edu",
    condition="direct",
    files={"definition": 30_000, "word": 25_000, "kind": 25_000, "is_a": 20_000, "opposite": 4_000},
    needs=debian_file(lambda: folder() / "data.noun", "wordnet-base", "or set WNSEARCHDIR to the folder of data.noun"),
)
def generate(file: str, seed: int) -> Iterator[Keyed]:
    """What English words mean, which kind of thing they name, and what their opposites are."""
    synsets = read_synsets(folder())
    nouns = [synset for synset in synsets.values() if synset.key[0] == "n" and synset.kinds]
    rng = random.Random(f"{file} {seed}")
    for synset in rng.sample(list(synsets.values()), len(synsets)):
        asked = ask(file, synset, synsets, nouns, rng)
        if asked is not None:
            question, answer = asked
            yield Keyed(f"wordnet/{file}", pair_key(file, synset), Example("direct", question, answer), answer)
