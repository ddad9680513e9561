"""Filters of cleaned examples, all off by default: a filter looks at one and gives a reason to drop it, or None."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hrm_text.contracts import Example, UserError
from hrm_text.data.sources.custom import load_module

Filter = Callable[[Example], str | None]
"""The reason is a few fixed words: dropped examples are counted by it."""


def find_filters(names: Sequence[str]) -> list[Filter]:
    """The filters of those names, in that order.

    Args:
        names: of ``FILTERS``, or ``FILE.py:FUNCTION`` for one of your own.

    Raises:
        UserError: there is no such filter, file or function.
    """
    return [_find_filter(name) for name in names]


def _find_filter(name: str) -> Filter:
    if name in FILTERS:
        return FILTERS[name]
    file, _, function = name.rpartition(":")
    if not file:
        raise UserError(f"unknown filter {name!r}; expected {', '.join(FILTERS)}, or FILE.py:FUNCTION for your own")
    found = getattr(load_module(Path(file)), function, None)
    if not callable(found):
        raise UserError(f"{file}: no function {function!r} in it, which --filters names")
    own: Filter = found
    return own


_EMAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*[A-Za-z]{2}")
# International with its country code, or the North American form with its separators: bare digits are no phone number,
# or every sum of ten digits would be one.
_PHONE = re.compile(
    r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}-\d{3}-\d{4})(?![\w-])"
)
_IPV4 = re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.]*\d)")
_CARD = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)")


def pii(example: Example) -> str | None:
    """Looks for what identifies a person: e-mail addresses, phone numbers, IPv4 addresses, numbers of credit cards.

    Forms are all it knows: it finds neither names nor addresses, and it drops made-up ones too.
    """
    for text in (example.instruction, example.response):
        # A single character rules most texts out, at a tenth of the time of the expressions.
        if "@" in text and _EMAIL.search(text):
            return "an e-mail address"
        if ("+" in text or "-" in text or "(" in text) and any(map(_is_phone, _PHONE.findall(text))):
            return "a phone number"
        if "." in text and _IPV4.search(text):
            return "an IPv4 address"
        if any(map(_is_card, _CARD.findall(text))):
            return "a credit card number"
    return None


def _is_phone(found: str) -> bool:
    return 9 <= len(_digits(found)) <= 15  # E.164 has at most 15; "+12 345" is a sum


def _is_card(found: str) -> bool:
    """Issuers start with 2 to 6, a card has no digit alone, and the Luhn sum of its digits is a multiple of ten."""
    digits = _digits(found)
    return digits[0] in "23456" and len(set(digits)) > 1 and _luhn_sum(digits) % 10 == 0


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _luhn_sum(digits: str) -> int:
    """Every second digit from the right, the last one left out, counts twice, and as the sum of its own digits."""
    return sum(sum(divmod(int(digit) * (1 + index % 2), 10)) for index, digit in enumerate(reversed(digits)))


_ENGLISH_LETTERS = 0.9
_ENGLISH_WORDS = 0.08
_ENOUGH_WORDS = 20
_SEEN_CHARACTERS = 20_000
_FUNCTION_WORDS = frozenset(
    "an and are as at be been but by can did do does for from had has have he her his how if in is it its may me my no "
    "not of on or our she should so some than that the their them then there these they this to was we were what "
    "when where which who why will with would you your".split()
)


def english(example: Example) -> str | None:
    """Drops what is plainly another language.

    Crude on purpose. At least nine of ten letters are of the English alphabet and, where there are 20 different words
    of two letters or more, 8 in a hundred are function words such as "the" (English prose has 40). Formulas, code and
    short answers pass; so does another language in Latin letters where there is little of it.
    """
    text = f"{example.instruction}\n{example.response}"[:_SEEN_CHARACTERS]
    if not text.isascii():
        letters = [character.isascii() for character in text if character.isalpha()]
        if sum(letters) < _ENGLISH_LETTERS * len(letters):
            return "letters of another alphabet"
    words = list(_prose(text))
    if len(set(words)) >= _ENOUGH_WORDS and sum(word in _FUNCTION_WORDS for word in words) < _ENGLISH_WORDS * len(
        words
    ):
        return "too few English words"
    return None


def _prose(text: str) -> Iterator[str]:
    """Words of lower-case letters alone, but for the first: formulas, code, names and numbers are left out."""
    for word in text.split():
        bare = word.strip(".,;:!?\"'()")
        if len(bare) > 1 and bare.isalpha() and (bare.islower() or bare.istitle()):
            yield bare.lower()


FILTERS: dict[str, Filter] = {"pii": pii, "english": english}
"""The built-in ones."""
