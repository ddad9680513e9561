"""DROP's exact match and F1 (Dua et al. 2019), to the rounding of lm-evaluation-harness.

An answer is one or several spans of text. A response is one span. Spans are compared as texts after normalisation
(exact match) and as sets of words (F1).
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from hrm_text.eval.task import Question, Row, Scored

_FIELDS = ("number", "spans", "date")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def accepted_answers(row: Row) -> list[list[str]]:
    """The answers that a row of the data set accepts, each a list of spans: the annotator's, then those that validated.

    Of the fields of an answer the number counts, else its spans, else its date. Validated answers are a list of objects
    or, in Parquet files, an object of lists.
    """
    validated = row["validated_answers"]
    if isinstance(validated, Mapping):
        columns = [validated[name] for name in ("number", "spans", "date")]
        validated = [
            dict(zip(("number", "spans", "date"), values, strict=True)) for values in zip(*columns, strict=True)
        ]
    answers = [_spans(answer) for answer in (row["answer"], *validated)]
    return [list(spans) for spans in dict.fromkeys(answers)]


def _spans(answer: Mapping[str, Any]) -> tuple[str, ...]:
    if answer["number"] != "":
        return (str(answer["number"]),)
    date = answer["date"]
    return tuple(answer["spans"]) or (" ".join(date[part] for part in ("day", "month", "year")).strip(),)


def score_drop(response: str, question: Question) -> Scored:
    """Score a response by its F1; the exact match goes along.

    Args:
        response: of the model; all of it is the answer.
        question: its answer is a list of accepted answers, each a list of spans.
    """
    said = response.strip()
    exact, f1 = drop_scores(said, question.answer)
    return Scored(f1, f1, said, readable=bool(said), also={"exact_match": exact})


def drop_scores(response: str, accepted: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Exact match and F1, each with the accepted answer that is best for it; one without text is passed over."""
    scores = [_compare(response, spans) for spans in accepted if spans[0].strip()]
    return max((exact for exact, _ in scores), default=0.0), max((f1 for _, f1 in scores), default=0.0)


def _compare(response: str, spans: Sequence[str]) -> tuple[float, float]:
    said, wanted = normalised(response), [normalised(span) for span in spans]
    # The single span of a response can be aligned with one of the wanted ones; the others count 0.
    best = max(_f1(set(said.split()), set(span.split())) for span in wanted)
    # Half to even, on hundredths.
    return float(wanted == [said]), round(100 * best / len(wanted)) / 100


def _f1(said: set[str], wanted: set[str]) -> float:
    """F1 of two sets of words; 0 where what is wanted has numbers and none of them is said."""
    numbers = {word for word in wanted if _is_number(word)}
    if numbers and numbers.isdisjoint(said):
        return 0.0
    common = len(said & wanted)
    precision = common / len(said) if said else 1.0
    recall = common / len(wanted) if wanted else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def normalised(span: str) -> str:
    """Lower case, without punctuation and articles, numbers as floats, one space between words.

    Words end at spaces and hyphens only, which takes the sign of a number away; other white space within such a word
    becomes a space after numbers were looked for.
    """
    words = (" ".join(_word(piece).split()) for piece in re.split("[ -]", span))
    return " ".join(filter(None, words))


def _word(piece: str) -> str:
    word = piece.lower()
    if not _is_number(word):
        word = word.translate(_PUNCTUATION)
    return _ARTICLE.sub(" ", str(float(word)) if _is_number(word) else word)


def _is_number(text: str) -> bool:
    """Whether Python reads it as a float: "inf", "nan" and "1e5" count, "1,000" does not before its comma is gone."""
    try:
        float(text)
    except ValueError:
        return False
    return True
