"""What the harness asks, in our terms."""

from __future__ import annotations

from typing import Any

import pytest

from hrm_text.contracts import UserError
from hrm_text.eval.harness import Generation, keep_end, read_condition, read_generation, response_of, windows


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({}, Generation(256, (), {"temperature": 0.0})),
        ({"until": "\n\n", "max_gen_toks": 8}, Generation(8, ("\n\n",), {"temperature": 0.0})),
        ({"until": ["Q:", "", "</s>"], "max_tokens": 9, "max_new_tokens": 7, "num_beams": 1},
         Generation(7, ("Q:", "</s>"), {"temperature": 0.0})),
        ({"do_sample": False, "temperature": 0.7}, Generation(256, (), {"temperature": 0.0})),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": None}, Generation(256, (), {"temperature": 0.7, "top_p": 0.9})),
        ({"do_sample": True}, Generation(256, (), {"temperature": 1.0})),
        ({"do_sample": True, "temperature": 0.0}, Generation(256, (), {"temperature": 0.0})),
    ],
)  # fmt: skip
def test_generation_keywords_become_settings(keywords: dict[str, Any], expected: Generation) -> None:
    assert read_generation(keywords, 256) == expected


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"typical_p": 0.2}, "'typical_p' means nothing to this model; it knows do_sample"),
        ({"num_beams": 4}, "num_beams is 4, and there is no beam search"),
        ({"do_sample": "yes"}, "do_sample must be true or false, found 'yes'"),
    ],
)
def test_what_would_be_another_protocol_is_an_error(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_generation(keywords, 256)


def test_a_condition_has_no_comma_on_the_command_line() -> None:
    assert read_condition("synth+cot") == "synth,cot" == read_condition("synth,cot")


@pytest.mark.parametrize(
    ("continuation", "response"), [(" Paris", "Paris"), ("Paris", "Paris"), ("\n\nA b ", "A b "), (" ", " "), ("", "")]
)
def test_the_space_that_joins_two_texts_is_part_of_neither(continuation: str, response: str) -> None:
    assert response_of(continuation) == response


def test_a_long_prompt_keeps_its_tags_and_its_question() -> None:
    prompt = [6, 7, *range(100, 120), 8]
    assert keep_end(prompt, 2, 30) == tuple(prompt)
    assert keep_end(prompt, 2, len(prompt)) == tuple(prompt)
    assert keep_end(prompt, 2, 6) == (6, 7, 117, 118, 119, 8)
    assert keep_end(prompt, 2, 3) == (6, 7, 8)
    with pytest.raises(UserError, match="no room for a prompt: 2 tokens are left and an empty one has 3"):
        keep_end(prompt, 2, 2)


@pytest.mark.parametrize("room", [2, 3, 7, 10])
def test_windows_score_every_token_once_within_the_room(room: int) -> None:
    for length in range(40):
        found = windows(length, room)
        assert [place for _, start, end in found for place in range(start, end)] == list(range(length))
        assert all(0 <= seen <= start < end and end - seen <= room for seen, start, end in found)
        assert all(start - seen == room // 2 for seen, start, _ in found[1:])  # none starts without having read
        assert len(found) <= 1 or length > room
