from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from hrm_text.data.sources import SOURCES
from hrm_text.data.sources.wordnet import pair_key, parse, read_synsets

NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE, by
00000001 03 n 01 entity 0 002 ~ 00000002 n 0000 ~ 00000003 n 0000 | that which exists
00000002 03 n 02 living_thing 0 animate_thing 0 001 @ 00000001 n 0000 | an entity that lives; "it is alive"
00000003 03 n 01 rock 0 002 @ 00000001 n 0000 + 00000009 v 0101 | a hard entity; found anywhere; "rock; and more"
00000004 03 n 01 dog 0 001 @ 00000002 n 0000 | an animal that barks
00000005 03 n 01 granite 0 001 @i 00000003 n 0000 | a rock
"""
ADJECTIVES = """\
00000007 00 a 01 hot(p) 0 001 ! 00000008 a 0101 | having heat
00000008 00 s 02 cold 0 cool 0 001 ! 00000007 a 0101 | lacking heat
"""


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {"noun": NOUNS, "adj": ADJECTIVES, "verb": "", "adv": ""}.items():
        (tmp_path / f"data.{name}").write_text(text, encoding="utf-8")
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    return tmp_path


def test_a_line_is_read_as_documented() -> None:
    synset = parse(NOUNS.splitlines()[2])
    assert synset == ("n00000002", ["living thing", "animate thing"], "an entity that lives", ["n00000001"], [])
    rock = parse(NOUNS.splitlines()[3])
    assert rock.definition == "a hard entity; found anywhere"
    assert rock.kinds == ["n00000001"]
    hot, cold = map(parse, ADJECTIVES.splitlines())
    assert hot.words == ["hot"]
    assert (hot.key, cold.key) == ("a00000007", "a00000008")
    assert pair_key("opposite", hot) == pair_key("opposite", cold)


def test_the_licence_is_passed_over(database: Path) -> None:
    assert len(read_synsets(database)) == 7


def test_each_file_asks_what_it_says_and_answers_from_the_database(database: Path) -> None:
    made = {file: list(SOURCES["wordnet"].generate(file, 0)) for file in SOURCES["wordnet"].files}
    definitions = {keyed.answer for keyed in made["definition"]}
    assert "an animal that barks" in definitions
    assert len(made["definition"]) == 7
    dog = next(keyed for keyed in made["kind"] if "dog" in keyed.example.instruction)
    assert dog.answer == "living thing"
    assert {keyed.answer for keyed in made["opposite"]} == {"hot", "cold"}


def test_a_noun_is_asked_about_its_kind_or_one_that_it_is_not(database: Path) -> None:
    above = {
        "dog": {"living thing", "entity"},
        "granite": {"rock", "entity"},
        "rock": {"entity"},
        "living thing": {"entity"},
    }
    answers = set()
    for seed in range(30):
        for keyed in SOURCES["wordnet"].generate("is_a", seed):
            question = keyed.example.instruction
            word = next(word for word in above if f"{word} " in f"{question} ".replace(":", " "))
            is_above = any(kind in question.replace(word, "", 1) for kind in above[word])
            assert keyed.answer == ("yes" if is_above else "no"), question
            answers.add(keyed.answer)
    assert answers == {"yes", "no"}


def test_the_same_seed_gives_the_same_order(database: Path) -> None:
    first, same, other = (
        [keyed.key for keyed in itertools.islice(SOURCES["wordnet"].generate("word", seed), 7)] for seed in (0, 0, 1)
    )
    assert first == same
    assert sorted(first) == sorted(other)
