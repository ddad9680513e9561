from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from hrm_text.contracts import Engine, UserError
from hrm_text.eval.metrics import wilson_interval
from hrm_text.eval.runner import LENGTH_STEP, EvalItem, EvalTask, evaluate


@dataclass
class KnowsSome:
    """An engine that answers from a table, "?" where it has nothing, and remembers what it was asked."""

    answers: Mapping[tuple[str, str], str]
    calls: list[tuple[list[str], str, int, float]] = field(default_factory=list)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        condition: str = "direct",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        self.calls.append((list(prompts), condition, max_new_tokens, temperature))
        return [self.answers.get((condition, prompt), "?") for prompt in prompts]


def items(condition: str, **answers: str) -> list[EvalItem]:
    return [EvalItem(condition, prompt, answer) for prompt, answer in answers.items()]


def test_scores_and_results_follow_tasks_and_items() -> None:
    engine = KnowsSome({("direct", "a"): "1", ("direct", "b"): " 2\n", ("direct", "c"): "7", ("cot", "d"): "4"})
    assert isinstance(engine, Engine)
    letters = EvalTask("letters", items("direct", a="1", b="2", c="3") + items("cot", d="4"), 8, chance=0.1)
    others = EvalTask("others", items("direct", e="5", a="wrong"), 8, chance=0.5)

    evaluation = evaluate(engine, [letters, others])

    first, second = evaluation.scores
    assert (first.task, first.n, first.correct, first.accuracy, first.chance) == ("letters", 4, 3, 0.75, 0.1)
    assert (first.low, first.high) == wilson_interval(3, 4)
    assert (second.task, second.n, second.correct, second.accuracy, second.chance) == ("others", 2, 0, 0.0, 0.5)
    assert evaluation.mean_accuracy == 0.375
    assert [(r.task, r.prompt, r.expected, r.response, r.got, r.ok) for r in evaluation.results] == [
        ("letters", "a", "1", "1", "1", True),
        ("letters", "b", "2", " 2\n", "2", True),
        ("letters", "c", "3", "7", "7", False),
        ("letters", "d", "4", "4", "4", True),
        ("others", "e", "5", "?", "?", False),
        ("others", "a", "wrong", "1", "1", False),
    ]


def test_a_call_has_one_condition_and_one_length_and_is_greedy() -> None:
    engine = KnowsSome({})
    mixed = EvalTask("mixed", [*items("direct", a="1"), *items("cot", b="2"), *items("direct", c="3")], 8, chance=0)
    same_length = EvalTask("same_length", items("direct", d="4"), 8, chance=0)
    longer = EvalTask("longer", items("direct", e="5"), 99, chance=0)
    evaluate(engine, [mixed, same_length, longer])
    assert engine.calls == [
        (["a", "c", "d"], "direct", LENGTH_STEP, 0.0),
        (["b"], "cot", LENGTH_STEP, 0.0),
        (["e"], "direct", 4 * LENGTH_STEP, 0.0),
    ]


def test_batches_and_progress() -> None:
    engine = KnowsSome({})
    progress: list[tuple[int, int]] = []
    numbers = EvalTask("numbers", items("direct", **{str(i): "" for i in range(7)}), 8, chance=0)
    letters = EvalTask("letters", items("cot", a="", b=""), 8, chance=0)
    evaluate(engine, [numbers, letters], batch_size=3, on_progress=lambda done, total: progress.append((done, total)))
    assert [len(prompts) for prompts, *_ in engine.calls] == [3, 3, 1, 2]
    assert progress == [(3, 9), (6, 9), (7, 9), (9, 9)]


def test_the_answer_is_looked_for_in_the_response_by_the_items_own_rule() -> None:
    engine = KnowsSome({("cot", "3 + 4"): "3, 4, so = 7", ("cot", "2 + 2"): "2, 2, so = 5"})
    last = [
        EvalItem("cot", prompt, answer, lambda response: response[-1])
        for prompt, answer in (("3 + 4", "7"), ("2 + 2", "4"))
    ]
    first, second = evaluate(engine, [EvalTask("sums", last, 16, chance=0)]).results
    assert (first.response, first.got, first.ok) == ("3, 4, so = 7", "7", True)
    assert (second.got, second.ok) == ("5", False)


def test_tasks_that_cannot_be_scored_are_refused() -> None:
    some = EvalTask("some", items("direct", a="1"), 8, chance=0)
    with pytest.raises(UserError, match="no task to evaluate"):
        evaluate(KnowsSome({}), [])
    with pytest.raises(UserError, match="task 'empty' has no items"):
        evaluate(KnowsSome({}), [some, EvalTask("empty", [], 8, chance=0)])
    with pytest.raises(UserError, match="two tasks are called 'some'"):
        evaluate(KnowsSome({}), [some, some])


def test_an_engine_that_loses_an_answer_is_a_bug() -> None:
    class Loses(KnowsSome):
        def generate(self, prompts: Sequence[str], **settings: object) -> list[str]:
            return ["?"] * (len(prompts) - 1)

    with pytest.raises(ValueError, match="shorter"):
        evaluate(Loses({}), [EvalTask("some", items("direct", a="1", b="2"), 8, chance=0)])
