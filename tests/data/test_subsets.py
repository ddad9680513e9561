from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hrm_text.contracts import UserError
from hrm_text.data.benchmarks import Question
from hrm_text.data.subsets import read_scores, subsets_of, z_score

QUESTIONS = [
    *(Question("gsm8k", index, str(index), ("?",)) for index in range(3)),
    *(Question("arc", index, name, ("?",)) for index, name in enumerate(("x", "y", "y"))),
]


def test_z_score_by_hand() -> None:
    # Six of ten right: mean 0.6, standard deviation sqrt(0.6 * 0.4) = 0.4899. All of the four dirty ones are right:
    # (1 - 0.6) / (0.4899 / 2) = 1.633. Two of the six clean ones: (1/3 - 0.6) / (0.4899 / 2.4495) = -1.3333.
    scores = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], np.float64)
    coverage = np.array([0.8, 1, 0.9, 0.85, 0.1, 0, 0.19, 0.199, 0, 0])
    clean, not_clean, not_dirty, dirty = subsets_of(coverage, scores)
    assert [part.questions for part in (clean, not_clean, not_dirty, dirty)] == [6, 4, 6, 4]
    assert dirty.score == 1
    assert dirty.z == pytest.approx(1.63299, abs=1e-5)
    assert clean.z == pytest.approx(-1.33333, abs=1e-5)
    assert not dirty.flagged
    assert clean.mean_coverage == pytest.approx(0.489 / 6)
    # Ten times the questions: sqrt(10) times the score.
    often = subsets_of(np.repeat(coverage, 10), np.repeat(scores, 10))
    assert often[3].z == pytest.approx(5.16398, abs=1e-5)
    assert [part.flagged for part in often] == [True] * 4


def test_bounds_of_the_subsets() -> None:
    names = {part.name: part.questions for part in subsets_of(np.array([0, 0.2, 0.79, 0.8, 1]))}
    assert names == {"clean": 1, "not clean": 4, "not dirty": 3, "dirty": 2}


def test_subsets_without_questions_or_scores() -> None:
    clean, not_clean, *_ = subsets_of(np.zeros(4), np.ones(4))
    assert (not_clean.questions, not_clean.mean_coverage, not_clean.score, not_clean.z) == (0, None, None, None)
    assert (clean.score, clean.z) == (1.0, None)  # all alike: nothing to compare
    assert not clean.flagged
    assert all(part.score is part.z is None for part in subsets_of(np.array([0.0, 1.0])))
    assert z_score(1.0, 3, np.ones(3)) is None


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_scores_are_found_by_index_or_id(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"benchmark": "gsm8k", "index": index, "correct": index == 1} for index in (2, 0, 1)
    ]
    lines += [{"benchmark": "arc", "id": "x", "correct": 0.5}]
    lines += [{"benchmark": "arc", "index": index, "correct": 0} for index in (1, 2)]
    scores = read_scores(write(tmp_path / "scores.jsonl", *lines), QUESTIONS)
    assert {name: of.tolist() for name, of in scores.items()} == {"gsm8k": [0, 1, 0], "arc": [0.5, 0, 0]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["nonsense\n"], r":1: not valid JSON"),
        ([3], r":1: expected an object"),
        ([{"benchmark": "gsm8k", "index": 0}], r":1: expected an object with benchmark, index or id, and correct"),
        ([{"benchmark": "gsm", "index": 0, "correct": 1}], r"unknown benchmark 'gsm'; there are gsm8k, arc"),
        ([{"benchmark": "gsm8k", "index": 3, "correct": 1}], r"no one question .*gsm8k has the questions 0 to 2"),
        ([{"benchmark": "gsm8k", "index": True, "correct": 1}], r"no one question"),
        ([{"benchmark": "arc", "id": "y", "correct": 1}], r"no one question"),
        ([{"benchmark": "gsm8k", "index": 0, "correct": "yes"}], r"correct to be a number from 0 to 1, found 'yes'"),
        ([{"benchmark": "gsm8k", "index": 0, "correct": 2}], r"correct to be a number from 0 to 1"),
        ([{"benchmark": "gsm8k", "index": 0, "correct": 1}] * 2, r":2: question 0 of gsm8k has a score already"),
        ([{"benchmark": "gsm8k", "index": 1, "correct": 1}], r"lacks 2 of 3 scores of gsm8k, first of question 0"),
    ],
)
def test_bad_scores(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_scores(write(tmp_path / "scores.jsonl", *lines), QUESTIONS)


def test_scores_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_scores(tmp_path / "scores.jsonl", QUESTIONS)
