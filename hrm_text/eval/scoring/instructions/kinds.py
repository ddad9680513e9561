"""The 25 kinds of instructions that a program can verify: table 1 of Zhou et al. (2023), by upstream's names.

Each is a function of the response and the instruction's arguments, which have upstream's names. What the description
leaves open is decided as upstream decides it: keywords may be part of a longer word, forbidden words must stand alone;
counts of placeholders, sections and highlights are at least, those of bullets and paragraphs are exact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from hrm_text.contracts import UserError
from hrm_text.eval.scoring.instructions.language import language_of

_ABBREVIATIONS = (
    "mr mrs ms dr prof sr jr st vs etc e.g i.e fig no inc ltd co u.s u.k a.m p.m approx dept est vol".split()
)
_SENTENCE_END = re.compile(r"""(?:[.!?…]+|[。！？])["'”’)\]*_]*(?=\s|$|(?<=[。！？]))""")
_LAST_WORD = re.compile(r"[\w.]+$")


def sentences(text: str) -> int:
    """Number of sentences: each ends at a mark before white space, but not behind an abbreviation or an initial."""
    count, start = 0, 0
    for mark in _SENTENCE_END.finditer(text):
        before = _LAST_WORD.search(text[max(start, mark.start() - 20) : mark.start()])
        word = before[0].lower() if before and mark[0].startswith(".") else ""
        more = bool(text[mark.end() :].strip())
        initial = len(word) == 1 and word.isalpha() and word != "i"
        if more and (word in _ABBREVIATIONS or initial or _numbers_item(text, mark.start(), word)):
            continue
        if any(character.isalnum() for character in text[start : mark.start()]):
            count += 1
        start = mark.end()
    return count + any(character.isalnum() for character in text[start:])


def _numbers_item(text: str, end: int, word: str) -> bool:
    """Whether a word is a number, and all there is of its line so far: that of an item of a list."""
    return word.isdigit() and not text[text.rfind("\n", 0, end) + 1 : end - len(word)].strip()


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


def _compare(count: int, relation: str, bound: int) -> bool:
    if relation == "at least":
        return count >= bound
    if relation == "less than":
        return count < bound
    raise UserError(f"unknown relation {relation!r} in an instruction; expected 'at least' or 'less than'")


def _count(text: str, part: str) -> int:
    return text.lower().count(part.lower())


def keywords_existence(response: str, *, keywords: Sequence[str]) -> bool:
    """Every keyword occurs."""
    return all(_count(response, keyword) for keyword in keywords)


def keywords_frequency(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """A keyword occurs so often."""
    return _compare(_count(response, keyword), relation, frequency)


def forbidden_words(response: str, *, forbidden_words: Sequence[str]) -> bool:
    """None of the words occurs on its own."""
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """A character occurs so often, in either case."""
    return _compare(_count(response, letter), let_relation, let_frequency)


def response_language(response: str, *, language: str) -> bool:
    """The whole is in a language."""
    return language_of(response) == language


def number_sentences(response: str, *, num_sentences: int, relation: str) -> bool:
    """There are so many sentences."""
    return _compare(sentences(response), relation, num_sentences)


def number_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs, ``***`` between them; one before the first or behind the last changes nothing."""
    return _parts(response, "***") == num_paragraphs


def _parts(response: str, divider: str) -> int | None:
    parts = [part.strip() for part in response.split(divider)]
    # Empty ones at the ends are a divider there; one in between is a divider too many.
    return None if not all(parts[1:-1]) else sum(map(bool, parts))


def number_words(response: str, *, num_words: int, relation: str) -> bool:
    """There are so many words."""
    return _compare(len(words(response)), relation, num_words)


def nth_paragraph_first_word(response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs, an empty line between them, and one begins with a word."""
    paragraphs = [part for part in re.split(r"\n\s*\n", response) if part.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    found = re.match(r"\W*(\w+(?:-\w+)*)", paragraphs[nth_paragraph - 1])
    return bool(found) and found[1].lower() == first_word.lower()  # type: ignore[index]


def number_placeholders(response: str, *, num_placeholders: int) -> bool:
    """At least so many placeholders in square brackets."""
    return len(re.findall(r"\[[^\[\]\n]*\]", response)) >= num_placeholders


def postscript(response: str, *, postscript_marker: str) -> bool:
    """There is a postscript with that marker; a space between its letters changes nothing."""
    letters = r"\s?".join(re.escape(part) for part in re.findall(r"\w+\.?", postscript_marker))
    return bool(letters) and re.search(rf"(?<![\w.]){letters}", response, re.IGNORECASE) is not None


def number_bullet_lists(response: str, *, num_bullets: int) -> bool:
    """Exactly so many lines that begin with ``*`` or ``-`` and a space; rules are none."""
    lines = re.findall(r"^\s*[*-][ \t]+\S.*$", response, re.MULTILINE)
    return sum(not re.fullmatch(r"[\s*-]+", line) for line in lines) == num_bullets


def constrained_response(response: str) -> bool:
    """One of the three answers that are allowed occurs."""
    return any(f"My answer is {answer}." in response for answer in ("yes", "no", "maybe"))


def number_highlighted_sections(response: str, *, num_highlights: int) -> bool:
    """At least so many parts between single or double asterisks."""
    found = re.findall(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", response)
    return sum(bool("".join(parts).strip()) for parts in found) >= num_highlights


def multiple_sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections, each headed by the word and a number."""
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    """The whole is JSON, in a fenced block or bare."""
    block = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", response, re.DOTALL | re.IGNORECASE)
    try:
        json.loads(block[1] if block else response)
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    """A title in double angular brackets."""
    return any(found.strip("<> \t") for found in re.findall(r"<<([^\n]+?)>>", response))


def two_responses(response: str) -> bool:
    """Two different responses, six asterisks between them."""
    parts = {part.strip() for part in response.split("******")}
    return _parts(response, "******") == 2 and len(parts - {""}) == 2


def repeat_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    """The response begins with the request, word for word."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response: str, *, end_phrase: str) -> bool:
    """Nothing follows the phrase but a closing quotation mark."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    """The whole is in double quotation marks."""
    return re.fullmatch(r'\s*".*"\s*', response, re.DOTALL) is not None


def capital_word_frequency(response: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """So many words are in capitals; a word with a hyphen or an apostrophe is one."""
    found = re.findall(r"\w+(?:[-'’]\w+)*", response)
    return _compare(sum(word.isupper() for word in found), capital_relation, capital_frequency)


def english_capital(response: str) -> bool:
    """English, in capitals only."""
    return response.isupper() and language_of(response) == "en"


def english_lowercase(response: str) -> bool:
    """English, without a capital."""
    return response.islower() and language_of(response) == "en"


def no_comma(response: str) -> bool:
    """No comma."""
    return "," not in response


KINDS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": keywords_existence,
    "keywords:frequency": keywords_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""Every kind by upstream's name."""
