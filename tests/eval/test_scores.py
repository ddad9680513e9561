"""Scores of a task from those of its responses: what a question's several samples are worth together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from hrm_text.eval.answers import Answer
from hrm_text.eval.scores import TaskScore, answered, score_task
from hrm_text.eval.statistics import mean_interval
from hrm_text.eval.task import Question, Scored, Task


def score(response: str, question: Question) -> Scored:
    right = float(response == question.answer)
    return Scored(right, right, response, readable=True)


TASK = Task("sums", 1, "Sums", (), lambda rows: [], score, "direct", 8)


def scored(right: Sequence[Sequence[bool]], subjects: int = 0) -> TaskScore:
    """Of questions with as many samples each, right or wrong as given; in so many subjects."""
    task = dataclasses.replace(TASK, samples=len(right[0]), macro=subjects > 0)
    results = []
    for number, samples in enumerate(right):
        question = Question(str(number), "?", "1", subject=str(number % subjects) if subjects else "")
        results.append(answered(task, question, [Answer("1" if each else "0", 2, "stop") for each in samples]))
    return score_task(task, results, "unknown", 0.0)


@pytest.mark.parametrize("subjects", [0, 3])
@pytest.mark.parametrize("samples", [1, 8, 64])
def test_samples_of_a_question_that_agree_say_no_more_than_one(samples: int, subjects: int) -> None:
    """Questions are what was drawn: 64 equal answers to each of 30 are 30 answers, and not 1,920."""
    one = scored([[number % 5 < 2] for number in range(30)], subjects)
    many = scored([[number % 5 < 2] * samples for number in range(30)], subjects)
    assert (many.strict, many.low, many.high) == (one.strict, one.low, one.high)
    assert (many.published_low, many.published_high) == (one.published_low, one.published_high)
    assert many.high - many.low > 0.25


def test_samples_that_differ_make_a_question_surer_and_no_other() -> None:
    """The interval is that of the questions' means: what was drawn within a question is averaged out."""
    mixed = scored([[sample % 5 < 2 for sample in range(10)]] * 15 + [[sample % 5 < 3 for sample in range(10)]] * 15)
    assert mixed.strict == pytest.approx(0.5)
    interval = mean_interval([0.4] * 15 + [0.6] * 15)
    assert (mixed.low, mixed.high) == pytest.approx((interval.low, interval.high))
    certain = scored([[True] * 10] * 15 + [[False] * 10] * 15)
    assert mixed.high - mixed.low < certain.high - certain.low


def test_the_unbiased_estimates_of_samples() -> None:
    """Of 4 samples with 1 right, two drawn hold it in half of all ways; the majority is wrong."""
    found = scored([[True, False, False, False], [True, True, True, True]])
    assert found.strict == 5 / 8
    assert found.also == {"majority": 0.5, "pass@1": 5 / 8, "pass@2": 3 / 4, "pass@4": 1.0}
