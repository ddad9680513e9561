from __future__ import annotations

import random

import pytest

from hrm_text.infer.cache import Pages, Remembered
from hrm_text.infer.requests import Cycles, Turn

CYCLES = Cycles(2, 3)
QUESTION = (1, 2, 3, 4, 5)
AGAIN = (6, 7, 8)


def entry(
    pages: Pages, response: tuple[int, ...], turns: tuple[Turn, ...] = (), prefix: tuple[int, ...] = QUESTION
) -> list[int]:
    """A text that has ended: the pages are remembered, and nobody else's."""
    length = sum(turn.num_tokens for turn in turns) + len(prefix) + len(response)
    own = pages.take(pages.needed(length))
    assert own is not None
    pages.remember(Remembered((CYCLES, turns, prefix), response, own))
    pages.release(own)
    return own


def test_pages_are_taken_shared_and_given_back() -> None:
    pages = Pages(6, 4)
    assert (pages.num_tokens, pages.num_free, pages.needed(0), pages.needed(4), pages.needed(5)) == (20, 5, 0, 1, 2)
    first, second = pages.take(2), pages.take(3)
    assert first is not None and second is not None
    assert sorted(first + second) == [1, 2, 3, 4, 5], "page 0 is nobody's"
    assert pages.take(1) is None
    pages.share(first)
    pages.release(first)
    assert pages.num_free == 0
    pages.release(first)
    assert pages.num_free == 2
    with pytest.raises(AssertionError):
        pages.release(first)


def test_a_prompt_comes_again() -> None:
    pages = Pages(20, 4)
    own = entry(pages, (9, 9))
    assert [found.pages for found in pages] == [own]
    length, found = pages.recall(CYCLES, (Turn(QUESTION),))
    assert (length, found and found.pages) == (5, own)
    assert pages.recall(CYCLES, (Turn(QUESTION, (9, 9, 9)),))[0] == 7
    assert pages.recall(CYCLES, (Turn(QUESTION, (9, 8)),))[0] == 6, "a response is used as far as it is equal"
    for other in (QUESTION[:-1], (*QUESTION, 6), (0, *QUESTION[1:])):
        assert pages.recall(CYCLES, (Turn(other),)) == (0, None), "a prefix whole or not at all"
    assert pages.recall(Cycles(1, 3), (Turn(QUESTION),)) == (0, None)


def test_a_conversation_goes_on_where_it_was() -> None:
    pages = Pages(40, 4)
    entry(pages, (9, 9))
    first = Turn(QUESTION, (9, 9, 11))
    assert pages.recall(CYCLES, (first, Turn(AGAIN)))[0] == 7, "all but the end token, which nobody has read yet"
    entry(pages, (8,), (first,), AGAIN)
    assert pages.recall(CYCLES, (first, Turn(AGAIN)))[0] == 11
    assert pages.recall(CYCLES, (first, Turn(AGAIN, (8, 11)), Turn(QUESTION)))[0] == 12
    assert pages.recall(CYCLES, (Turn(QUESTION, (9, 7, 11)), Turn(AGAIN)))[0] == 6, "another answer was given"


def test_the_longer_of_two_that_begin_alike_is_kept_and_the_best_is_found() -> None:
    pages = Pages(40, 4)
    entry(pages, ())
    entry(pages, (9,))
    entry(pages, (8, 8))
    assert [found.response_ids for found in pages] == [(9,), (8, 8)]
    assert pages.recall(CYCLES, (Turn(QUESTION, (8, 8, 8)),))[0] == 7
    assert [found.response_ids for found in pages] == [(9,), (8, 8)]
    pages.recall(CYCLES, (Turn(QUESTION, (9, 1)),))
    assert [found.response_ids for found in pages] == [(8, 8), (9,)], "what was used last goes last"


def test_what_is_remembered_makes_way_the_oldest_first() -> None:
    pages = Pages(7, 4)
    entry(pages, (9,))
    entry(pages, (8,), prefix=AGAIN)
    assert (pages.num_free, pages.num_obtainable) == (3, 6)
    assert pages.take(4) is not None
    assert [found.response_ids for found in pages] == [(8,)]
    running = next(iter(pages)).pages
    pages.share(running)
    assert pages.num_obtainable == 1, "what is in use beside is not to be had"
    assert pages.take(2) is None
    pages.release(running)
    assert pages.num_free == 2


def test_no_page_is_ever_lost_or_owned_twice() -> None:
    chance = random.Random(3)
    pages = Pages(30, 4)
    running: list[list[int]] = []
    for number in range(2000):
        match chance.randrange(4):
            case 0 | 1:
                if (own := pages.take(chance.randrange(1, 6))) is not None:
                    assert not set(own) & {page for text in running for page in text}
                    running.append(own)
            case 2 if running:
                text = running[chance.randrange(len(running))]
                length = len(text) * 4 - chance.randrange(4)
                pages.remember(Remembered((CYCLES, (), (number,)), (7,) * (length - 1), text))
            case 3 if running:
                pages.release(running.pop(chance.randrange(len(running))))
    for text in running:
        pages.release(text)
    pages.forget_all()
    assert pages.num_free == 29
