from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hrm_text.data.prompt import PromptFormat
from hrm_text.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, tokenizer_info
from hrm_text.infer.text_stream import TextStream, token_text

Decode = Callable[[Sequence[int]], str]

TEXT = st.text(st.sampled_from("ab\n🙂é数\ufffd "), max_size=30)
STOPS = st.lists(st.text(st.sampled_from("ab\n🙂é\ufffd"), min_size=1, max_size=4), max_size=3)
FAST = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def decode_bytes(ids: Sequence[int]) -> str:
    """The worst tokenizer: a token is a byte, those from 256 are special."""
    return bytes(index for index in ids if index < 256).decode("utf-8", "replace")


PAIRS = [
    bytes([first, second]) for first in b"a\n\x80\xf0\x9f\x99\x82\xef\xbf\xbd" for second in b"a\x82\xf0\x9f\xbf\xef"
]


def decode_pairs(ids: Sequence[int]) -> str:
    """Tokens of two bytes, which may end one character and begin the next."""
    return b"".join(PAIRS[index] for index in ids if index < len(PAIRS)).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def decode(tokenizer_dir: Path, tokenizer: Tokenizer) -> Decode:
    return PromptFormat(tokenizer, tokenizer_info(tokenizer_dir)).decode


def before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The definition: the first character at which a stop string is complete, and the longest that is."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def parts(ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    places = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [ids[start:end] for start, end in pairwise(places)]


def check(decode: Decode, ids: Sequence[int], cuts: Sequence[int], stops: Sequence[str]) -> None:
    stream = TextStream(decode, stops)
    pieces = [stream.add(part) for part in parts(ids, cuts)]
    early = stream.stopped
    pieces.append(stream.finish())
    expected, stopped = before_stop(decode(ids), stops)
    assert ("".join(pieces), stream.stopped) == (expected, stopped)
    if early:
        assert pieces[-1] == ""


@FAST
@given(text=TEXT, cuts=st.lists(st.integers(0, 40), max_size=12), stops=STOPS)
def test_pieces_are_the_text_before_the_first_stop(
    text: str, cuts: list[int], stops: list[str], tokenizer: Tokenizer, decode: Decode
) -> None:
    check(decode, tokenizer.encode(text).ids, cuts, stops)


@FAST
@given(data=st.data(), each=st.booleans(), cuts=st.lists(st.integers(0, 40), max_size=12), stops=STOPS)
@pytest.mark.parametrize("kind", ["tokenizer", "bytes", "pairs"])
def test_any_tokens_at_all_give_the_text_of_all_at_once(
    kind: str, data: st.DataObject, each: bool, cuts: list[int], stops: list[str], tokenizer: Tokenizer, decode: Decode
) -> None:
    function, tokens = {
        "tokenizer": (decode, st.integers(0, tokenizer.get_vocab_size() - 1)),
        "bytes": (decode_bytes, st.sampled_from([*b"\n\xef\xbf\xbd\xf0\x9f\x99\x82\xe0\x80\xff\xc3", 300])),
        "pairs": (decode_pairs, st.integers(0, len(PAIRS))),
    }[kind]
    ids = data.draw(st.lists(tokens, max_size=40))
    check(function, ids, range(len(ids)) if each else cuts, stops)


def test_a_character_waits_for_all_its_bytes() -> None:
    stream = TextStream(decode_bytes)
    assert [stream.add([byte]) for byte in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]
    assert stream.add(list("é".encode())[:1]) == ""
    assert stream.finish() == "\ufffd"


def test_a_mark_in_the_response_is_late_by_one_token_at_most() -> None:
    """It looks like an unfinished character, and a response may have many: none of the others waits."""
    stream = TextStream(decode_bytes)
    pieces = [stream.add(list("\ufffd".encode())) for _ in range(5)]
    assert pieces == ["", "\ufffd", "\ufffd", "\ufffd", "\ufffd"]
    assert stream.finish() == "\ufffd"


def test_special_tokens_say_nothing_and_break_no_character() -> None:
    stream = TextStream(decode_bytes)
    first, *rest = "🙂".encode()
    assert [stream.add(ids) for ids in ([300], [first], [300] * 9, [*rest, 300])] == ["", "", "", "🙂"]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\n\nQ: two", ["\n\nQ", "\n"], "one"),  # the shorter one is complete first
        ("one\n\nQ: two", ["\n\nQ"], "one"),
        ("one\n\nR\n\n\nQ", ["\n\nQ"], "one\n\nR\n"),  # what looked like it begins again within itself
        ("xabcd", ["abcd", "bc"], "xa"),
        ("xabc", ["abc", "c", "bc"], "x"),  # complete together: the longest
        ("é\nb", ["\nb"], "é"),
        ("a🙂b", ["🙂"], "a"),
        ("a\ufffd", ["\ufffd"], "a"),
        ("ab", ["abc"], "ab"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_across_tokens(text: str, stops: list[str], expected: str, size: int) -> None:
    ids = list(text.encode())
    check(decode_bytes, ids, range(0, len(ids), size), stops)
    assert before_stop(text, stops)[0] == expected


def test_what_may_become_a_stop_is_held_and_nothing_else() -> None:
    stream = TextStream(decode_bytes, ["\n\nQ"])
    assert [stream.add([byte]) for byte in b"a\n\n\nQb"] == ["a", "", "", "\n", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_a_stop_string_met_at_the_very_end() -> None:
    """The mark may still become a character, so only the end tells that it is the stop string."""
    stream = TextStream(decode_bytes, ["\ufffd"])
    assert stream.add(list("a\ufffd".encode())) == "a"
    assert not stream.stopped
    assert stream.finish() == ""
    assert stream.stopped


@pytest.mark.parametrize(
    "unit", ["word ", "\ufffd", "🙂", b"\x82", b"\xf0\x9f", b"\xf0\xf0", b"\x99\x82\xf0\x9f"], ids=str
)
def test_a_token_is_decoded_with_few_others(unit: str | bytes) -> None:
    """Also where no token ends with a character, and in a flood of marks or of wrong bytes."""
    together: list[int] = []

    def counting(ids: Sequence[int]) -> str:
        together.append(len(ids))
        return b"".join([raw] * len(ids)).decode("utf-8", "replace")

    raw = unit if isinstance(unit, bytes) else unit.encode()
    stream = TextStream(counting, ["x" * 50])
    text = "".join(stream.add([0]) for _ in range(500))
    assert max(together) <= 4
    assert len(together) <= 500 * 5
    assert text + stream.finish() == (raw * 500).decode("utf-8", "replace")


def test_the_text_of_a_token(decode: Decode, tokenizer: Tokenizer) -> None:
    assert token_text(decode, tokenizer.encode("a").ids[0]) == "a"
    assert token_text(decode, SPECIAL_TOKENS.index("<|box_end|>")) == ""
    part = next(index for index in range(300) if decode([index]) == "\ufffd")
    assert token_text(decode, part) == "\ufffd"
