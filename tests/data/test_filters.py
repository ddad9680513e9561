from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.contracts import Example, UserError
from hrm_text.data.filters import FILTERS, english, find_filters, pii


def ask(text: str) -> Example:
    return Example("direct", text, "ok")


def answer(text: str) -> Example:
    return Example("direct", "what?", text)


PERSONAL = {
    "write to jane.doe+x@mail.example.org.": "an e-mail address",
    "call +49 30 1234567 today": "a phone number",
    "call +1-202-555-0143": "a phone number",
    "(202) 555-0143": "a phone number",
    "202-555-0143, ask for Ann": "a phone number",
    "ping 192.168.1.20 now": "an IPv4 address",
    "host 8.8.8.8.": "an IPv4 address",
    "card 4111 1111 1111 1111": "a credit card number",
    "card 5500-0000-0000-0004": "a credit card number",
    "card 378282246310005.": "a credit card number",
}


@pytest.mark.parametrize(("text", "reason"), PERSONAL.items())
def test_personal_data_is_found_on_both_sides(text: str, reason: str) -> None:
    assert pii(ask(text)) == reason
    assert pii(answer(text)) == reason


@pytest.mark.parametrize(
    "text",
    [
        "2+2=4, 12345 + 67890 = 80235 and 10 - 3 = 7",
        "x @ y is the product of matrices",
        "version 1.2.3 of 300.1.1.1 and 1.2.3.4.5",
        "card 4111 1111 1111 1112",
        "0000 0000 0000 0000",
        "+12 345",
        "pages 100-200-300",
        "3.14159265358979323846",
        "the year 2024-01-15",
        "",
    ],
)
def test_sums_versions_and_dates_are_nobodys(text: str) -> None:
    assert pii(ask(text)) is None


@given(st.integers(10**11, 10**15 - 1))
def test_of_the_ten_last_digits_exactly_one_makes_a_card(number: int) -> None:
    """Luhn: whatever comes before it, one check digit of ten is right."""
    stem = "4" + str(number)
    found = [digit for digit in range(10) if pii(ask(f"card {stem}{digit}")) == "a credit card number"]
    assert len(found) == (1 if 13 <= len(stem) + 1 <= 19 else 0)


ENGLISH = (
    "The quick brown fox jumps over the lazy dog, and then it goes back to the house where it was born. "
    "There is no reason to think that this would ever change."
)
GERMAN = (
    "Der schnelle braune Fuchs springt gern einmal im Monat durch den Wald und erschreckt dabei alle Hunde, "
    "die dort schlafen, sodass keiner mehr ruhig bleibt und sie laut bellen."
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ENGLISH, None),
        (ENGLISH + " Ça va, naïve café.", None),
        ("7", None),
        ("x = 1\ny = x + 2\nprint(x ** y)\n" * 20, None),
        (r"$\int_0^1 x^2 \, dx = \frac{1}{3}$ " * 20, None),
        ("这是一个中文句子，没有英文字母。", "letters of another alphabet"),
        ("Это предложение написано по-русски.", "letters of another alphabet"),
        (GERMAN, "too few English words"),
    ],
)
def test_english_passes_and_other_languages_do_not(text: str, reason: str | None) -> None:
    assert english(Example("direct", text, "42")) == reason


@given(st.text(), st.text())
def test_no_text_breaks_a_filter(instruction: str, response: str) -> None:
    for look in FILTERS.values():
        reason = look(Example("direct", instruction, response))
        assert reason is None or reason


def test_hostile_texts_take_no_time(tmp_path: Path) -> None:
    """No expression backtracks its way through a long text: 20 times the text is about 20 times the time."""
    import time

    for piece in ("a@", "a.", "1-", "+1 ", "1.2.3.", "4 ", "a" * 9 + "@b.", "(1"):
        seconds = []
        for times in (5_000, 100_000):
            begun = time.perf_counter()
            pii(ask(piece * times))
            seconds.append(time.perf_counter() - begun)
        assert seconds[1] < 2, piece


def test_a_filter_of_your_own_is_named_by_file_and_function(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(
        "def short(example):\n    return 'short' if len(example.response) < 3 else None\nnumber = 3\n"
    )
    found = find_filters(["pii", f"{tmp_path}/my.py:short"])
    assert [look(ask("jane@mail.org")) for look in found] == ["an e-mail address", "short"]
    for name, match in {
        "pi": "unknown filter 'pi'; expected pii, english, or FILE.py:FUNCTION",
        f"{tmp_path}/my.py:long": "no function 'long'",
        f"{tmp_path}/my.py:number": "no function 'number'",
        f"{tmp_path}/your.py:short": "no such file",
    }.items():
        with pytest.raises(UserError, match=match):
            find_filters([name])


def test_random_numbers_are_seldom_taken_for_cards() -> None:
    """One in ten passes the Luhn sum, which is what it can do; the issuer's digit halves that."""
    draw = random.Random(0)
    found = sum(pii(ask(f"n = {draw.randrange(10**15, 10**16)}")) is not None for _ in range(2000))
    assert found < 0.08 * 2000
