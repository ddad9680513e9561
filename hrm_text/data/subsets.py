"""Does contamination change a score? The four subsets of a benchmark, and their test.

After Llama 2 (arXiv 2307.09288, appendix A.6): a question is clean when less than 20 % of its tokens stand in the
corpus, dirty from 80 % on; "not clean" and "not dirty" are what each leaves of the whole. The mean score of a subset of
n questions is compared with what n questions drawn from the whole would give: Z = (mean of the subset - mean of the
whole) / (standard deviation of the whole / sqrt(n)). A subset is flagged at |Z| > 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from hrm_text.contracts import UserError
from hrm_text.data.benchmarks import MAX_LINE_BYTES, Question

CLEAN_BELOW = 0.2
DIRTY_FROM = 0.8
FLAGGED_ABOVE = 2.0


@dataclass(frozen=True, slots=True)
class Subset:
    """A part of a benchmark's questions."""

    name: str
    """clean, not clean, not dirty or dirty."""
    questions: int
    mean_coverage: float | None
    """None for no questions."""
    score: float | None = None
    """Mean; None without scores, or of no questions."""
    z: float | None = None
    """None without scores, of no questions, or where all questions have the same score."""

    @property
    def flagged(self) -> bool:
        return self.z is not None and abs(self.z) > FLAGGED_ABOVE


def subsets_of(coverage: npt.NDArray[np.float64], scores: npt.NDArray[np.float64] | None = None) -> list[Subset]:
    """The four subsets of a benchmark.

    Args:
        coverage: [questions]; share of each question's tokens that stand in the corpus.
        scores: [questions]; of each.
    """
    chosen = {
        "clean": coverage < CLEAN_BELOW,
        "not clean": coverage >= CLEAN_BELOW,
        "not dirty": coverage < DIRTY_FROM,
        "dirty": coverage >= DIRTY_FROM,
    }
    subsets = []
    for name, members in chosen.items():
        count = int(members.sum())
        if not count:
            subsets.append(Subset(name, 0, None))
            continue
        score = z = None
        if scores is not None:
            score = float(scores[members].mean())
            z = z_score(score, count, scores)
        subsets.append(Subset(name, count, float(coverage[members].mean()), score, z))
    return subsets


def z_score(mean: float, count: int, scores: npt.NDArray[np.float64]) -> float | None:
    """How far the mean of ``count`` questions is from that of all, in standard deviations of such means."""
    deviation = float(scores.std())
    return None if deviation == 0 else (mean - float(scores.mean())) / (deviation / math.sqrt(count))


def read_scores(path: Path, questions: Sequence[Question]) -> dict[str, npt.NDArray[np.float64]]:
    """The scores of questions, one JSON object a line: ``benchmark``, ``index`` or ``id``, ``correct`` (0 to 1).

    Args:
        path: JSON lines.
        questions: of all benchmarks.

    Returns:
        Of each benchmark that is named, [its questions]: the score of each.

    Raises:
        UserError: a line is no such object, names no question or one twice, or a benchmark has not all its scores.
    """
    numbers: dict[str, dict[str, int]] = {}
    for question in questions:
        of_benchmark = numbers.setdefault(question.benchmark, {})
        if question.number not in of_benchmark:
            of_benchmark[question.number] = question.index
        else:
            of_benchmark[question.number] = -1  # the name of several: an index is needed
    counts = {name: max(question.index for question in questions if question.benchmark == name) + 1 for name in numbers}
    scores: dict[str, npt.NDArray[np.float64]] = {}
    try:
        with path.open("rb") as file:
            line_number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                line_number += 1
                if not line.strip():
                    continue
                place = f"{path}:{line_number}"
                name, index, correct = _score(line, place, numbers, counts)
                of_scores = scores.setdefault(name, np.full(counts[name], np.nan))
                if not np.isnan(of_scores[index]):
                    raise UserError(f"{place}: question {index} of {name} has a score already; expected one of each")
                of_scores[index] = correct
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    for name, of_scores in scores.items():
        if lacking := int(np.isnan(of_scores).sum()):
            first = int(np.flatnonzero(np.isnan(of_scores))[0])
            raise UserError(
                f"{path}: lacks {lacking:,} of {len(of_scores):,} scores of {name}, first of question {first}"
            )
    return scores


def _score(
    line: bytes, place: str, numbers: Mapping[str, Mapping[str, int]], counts: Mapping[str, int]
) -> tuple[str, int, float]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get("benchmark"), str) or "correct" not in value:
        raise UserError(f"{place}: expected an object with benchmark, index or id, and correct")
    name, correct = value["benchmark"], value["correct"]
    if name not in counts:
        raise UserError(f"{place}: unknown benchmark {name!r}; there are {', '.join(counts)}")
    if not isinstance(correct, int | float) or not 0 <= correct <= 1:
        raise UserError(f"{place}: expected correct to be a number from 0 to 1, found {correct!r}")
    index = value.get("index")
    if index is None and "id" in value:
        index = numbers[name].get(str(value["id"]), -1)
    if type(index) is not int or not 0 <= index < counts[name]:
        known = f"{name} has the questions 0 to {counts[name] - 1}"
        raise UserError(f"{place}: names no one question by index or id; {known}")
    return name, index, float(correct)
