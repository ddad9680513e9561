from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hrm_text.contracts import UserError
from hrm_text.data.sources.upstream import DATASETS
from hrm_text.eval.few_shot import Choice, FewShot, Shot
from hrm_text.eval.scoring import maths
from hrm_text.eval.task import Dataset, Question, Row, Task
from hrm_text.eval.tasks import aime, arc, boolq, closed_book, drop, gsm8k, hellaswag, math, mmlu, mmlu_pro, winogrande

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHOICE = (mmlu.TASK, *arc.TASKS, hellaswag.TASK, winogrande.TASK, boolq.TASK)
BOXED = (gsm8k.TASK, math.TASK, aime.TASK)
TASKS = (*BOXED, drop.TASK, *CHOICE, mmlu_pro.TASK, closed_book.TASK)

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify, which scores MATH, is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Iterator[None]:
    yield
    maths.comparer().close()


class Rows:
    """The fixtures of a task; ``more`` repeats them, each time with other texts."""

    def __init__(self, task: Task, more: int = 1) -> None:
        self.task, self.more = task, more

    def __call__(self, dataset: Dataset, /) -> Sequence[Row]:
        assert dataset in self.task.datasets
        home = FIXTURES / (dataset.folder or self.task.name)
        named = home / (dataset.config or "")
        path = (named if dataset.config and named.is_dir() else home) / f"{dataset.split}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) | {"copy": copy} for copy in range(self.more) for line in lines]


def asked(task: Task) -> list[Question]:
    return list(task.questions(Rows(task)))


def by_name(task: Task) -> str:
    return task.name


def right_response(task: Task, question: Question) -> str:
    if task in BOXED:
        return rf"First think. \boxed{{{question.answer}}}"
    if task is drop.TASK:
        return str(question.answer[0][0])
    if task is closed_book.TASK:
        return str(question.answer[-1])
    return f"So it is ({question.answer})." if task is mmlu_pro.TASK else f" {question.answer}"


@pytest.mark.parametrize("task", TASKS, ids=by_name)
def test_every_row_is_a_question_with_a_name_of_its_own_and_fewer_examples_to_fall_back_on(task: Task) -> None:
    questions = asked(task)
    assert len(questions) >= 4
    assert len({question.id for question in questions}) == len(questions)
    for question in questions:
        assert question.prompt == question.prompt.strip() != ""
        lengths = [len(question.prompt), *map(len, question.shorter)]
        assert lengths == sorted(set(lengths), reverse=True)
        assert all(question.prompt.endswith(shorter.rpartition("\n\n")[2]) for shorter in question.shorter)
        assert bool(question.shorter) == bool(task.shots)
        json.dumps(question.answer)
    assert asked(task) == questions


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=needs_math_verify if task is math.TASK else ()) for task in TASKS], ids=by_name
)
def test_the_right_response_scores_1_and_others_nothing(task: Task) -> None:
    for question in asked(task):
        scored = task.score(right_response(task, question), question)
        assert scored.strict == 1 / len(question.answer[0]) if task is drop.TASK else scored.strict == 1
        wrong = task.score(r"\boxed{11}" if not question.choices else "Z", question)
        assert wrong.strict == 0
        assert wrong.published == (1 / question.choices if question.choices else 0)
        assert not task.score("", question).readable


@pytest.mark.parametrize("task", CHOICE, ids=by_name)
def test_a_wrong_letter_is_worth_nothing_as_published_too(task: Task) -> None:
    for question in asked(task):
        others = set("ABCDE"[: question.choices]) - {question.answer}
        assert {task.score(letter, question).published for letter in others} == {0}


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        (gsm8k.TASK, ("synth,cot", 3072, 3072, 0, False, 1)),
        (math.TASK, ("synth,cot", 3072, 3072, 0, False, 1)),
        (drop.TASK, ("direct", 3072, 3072, 3, False, 1)),
        (mmlu.TASK, ("direct", 4096, 1, 5, True, 1)),
        (arc.TASKS[0], ("direct", 4096, 1, 25, False, 1)),
        (arc.TASKS[1], ("direct", 4096, 1, 25, False, 1)),
        (hellaswag.TASK, ("direct", 4096, 1, 10, False, 1)),
        (winogrande.TASK, ("direct", 4096, 1, 5, False, 1)),
        (boolq.TASK, ("direct", 4096, 1, 5, False, 1)),
        (mmlu_pro.TASK, ("synth,cot", 3072, 3072, 0, True, 1)),
        (aime.TASK, ("synth,cot", 4096, 4096, 0, False, 256)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_published_protocol(task: Task, wanted: tuple[Any, ...]) -> None:
    found = (task.condition, task.context, task.max_new_tokens, task.shots, task.macro, task.samples)
    assert found == wanted
    assert bool(task.temperature) == (task.samples > 1)


@pytest.mark.parametrize("task", TASKS, ids=by_name)
def test_what_is_held_in_is_a_data_set_of_the_mixture(task: Task) -> None:
    assert set(task.held_in) <= set(DATASETS)


def number_of_shots(task: Task, question: Question) -> int:
    # A question ends in its mark, so that marks within the examples are those with an answer.
    mark = "\nA:" if task in (drop.TASK, closed_book.TASK) else "\nAnswer:"
    assert question.prompt.endswith(mark)
    return question.prompt.count(f"{mark} ")


@pytest.mark.parametrize("task", [task for task in TASKS if task.shots], ids=by_name)
def test_as_many_examples_as_published_and_always_the_same(task: Task) -> None:
    questions = list(task.questions(Rows(task, more=8)))
    few = {"high_school_european_history": 3}
    for question in questions:
        assert number_of_shots(task, question) == few.get(question.subject, task.shots)
    heads = {(question.subject, question.prompt.removesuffix(question.shorter[-1])) for question in questions}
    assert len(heads) == len({question.subject for question in questions})


def first(task: Task) -> Question:
    return asked(task)[0]


def test_prompts_of_open_answers() -> None:
    assert first(gsm8k.TASK).prompt == "A shelf holds 4 boxes with 6 cups each. How many cups is that?"
    assert [question.answer for question in asked(gsm8k.TASK)] == [24, 1250, -7, 0]
    assert (first(math.TASK).prompt, first(math.TASK).answer) == ("Solve $2x = 1$.", r"\frac{1}{2}")
    assert [question.subject for question in asked(math.TASK)] == math.SUBJECTS.split()
    assert [question.answer for question in asked(aime.TASK)] == [12, 729, 17, 8]
    assert first(mmlu_pro.TASK).prompt == (
        "Which number is prime?\nOptions:\n(A) 4\n(B) 6\n(C) 8\n(D) 9\n(E) 10\n(F) 12\n(G) 14\n(H) 15\n(I) 16\n(J) 17"
    )


def test_a_prompt_of_drop_has_one_example_of_each_passage() -> None:
    assert first(drop.TASK).prompt == (
        "The harbour opened in 1890. Two piers were built in 1895, and three more in 1902.\n"
        "Q: How many piers were there in the end?\nA: 5\n\n"
        "Anna Berg scored twice before the break. Her sister Ida scored once after it.\n"
        "Q: Who scored?\nA: Anna Berg, Ida\n\n"
        "The parish had 400 people in 1800, of whom 30 % were farmers and 10 % millers.\n"
        "Q: How many per cent were not farmers?\nA: 70\n\n"
        "On 3 May 1921 the ferry sank. Its crew of 12 and all 40 passengers were saved.\n"
        "Q: How many people were saved?\nA:"
    )
    assert [question.answer for question in asked(drop.TASK)] == [
        [["52"], ["12"]],
        [["3 May 1921"]],
        [["Ida"], ["Her sister Ida"]],
        [["1895", "1902"]],
    ]


def test_prompts_of_multiple_choice() -> None:
    assert first(winogrande.TASK).prompt.startswith(
        "The key did not fit the lock because the _ was bent.\nA. key\nB. lock\nAnswer: A\n\nThe sofa would"
    )
    assert first(winogrande.TASK).shorter[-1] == (
        "The book did not fit the bag because the _ was too small.\nA. book\nB. bag\nAnswer:"
    )
    assert first(boolq.TASK).shorter[-1] == (
        "Entry to the museum costs nothing.\nQuestion: Is the museum free?\nA. Yes\nB. No\nAnswer:"
    )
    assert first(hellaswag.TASK).shorter[-1] == (
        "A man digs a hole. He\nQuestion: Which ending follows best?\n"
        "A. sets a tree in it.\nB. drinks it.\nC. folds it up.\nD. mails it.\nAnswer:"
    )
    assert [question.answer for question in asked(mmlu.TASK)] == list("CDAB")
    assert [question.answer for question in asked(winogrande.TASK)] == list("BABA")
    assert [question.answer for question in asked(boolq.TASK)] == list("ABAB")
    assert [question.answer for question in asked(hellaswag.TASK)] == list("ABCD")


def test_an_option_of_arc_has_the_letter_of_its_place_whatever_upstream_calls_it() -> None:
    questions = asked(arc.TASKS[0])
    assert [(question.answer, question.choices) for question in questions] == [("B", 4), ("B", 4), ("A", 3), ("D", 5)]
    assert "A. trout\nB. frog\nC. bat\nD. wasp\nAnswer: C\n\n" in questions[0].prompt


def test_examples_of_mmlu_are_of_the_questions_own_subject() -> None:
    for question in asked(mmlu.TASK):
        assert ("Sun? (form 1)" in question.prompt) == (question.subject == "astronomy")
        assert ("copy 3" in question.prompt, "copy 4" in question.prompt) == (question.subject != "astronomy", False)


def test_half_of_the_examples_stay_where_there_is_no_room() -> None:
    question = FewShot(Shot(f"Q: {n}?\nA:", f"{n}") for n in range(25)).ask("Q: x?\nA:", id="0", answer="x")
    counts = [text.count("A: ") for text in (question.prompt, *question.shorter)]
    assert counts == [25, 12, 6, 3, 1, 0]
    assert question.shorter[-2] == "Q: 0?\nA: 0\n\nQ: x?\nA:"
    assert FewShot().ask("Q", id="0", answer="").shorter == ()


def test_a_choice_is_laid_out_in_one_form() -> None:
    choice = Choice(" Which? ", [" one", "two "], 1)
    assert choice.asked == "Which?\nA. one\nB. two\nAnswer:"
    assert choice.shot == Shot(choice.asked, "B")


def test_an_answer_of_aime_that_is_out_of_range_or_cut_has_no_vote() -> None:
    question = replace(first(aime.TASK), answer=25)
    for response, worth, readable in [
        (r"\boxed{025}", 1, True),
        (r"\boxed{25.0}", 1, True),
        (r"\boxed{26}", 0, True),
        (r"\boxed{25.5}", 0, False),
        (r"\boxed{-25}", 0, False),
        (r"\boxed{1000}", 0, False),
        ("It is 25.", 0, False),
    ]:
        scored = aime.TASK.score(response, question)
        assert (scored.strict, scored.published, scored.readable) == (worth, worth, readable), response
    assert aime.TASK.score(r"\boxed{025}", question).got == aime.TASK.score(r"\boxed{25}", question).got == "25"


def test_a_solution_of_math_without_a_box_is_named() -> None:
    def rows(dataset: Dataset, /) -> list[Row]:
        return [{"problem": "Why?", "solution": "Because."}]

    with pytest.raises(UserError, match=r"hendrycks_math, algebra/0: expected a solution with .boxed"):
        list(math.TASK.questions(rows))


def test_a_subject_of_mmlu_without_examples_is_named() -> None:
    row = {"subject": "anatomy", "question": "Why?", "choices": ["a", "b", "c", "d"], "answer": 0}
    with pytest.raises(UserError, match="cais/mmlu: no examples of 'anatomy' in the split dev"):
        list(mmlu.TASK.questions(lambda dataset: [row] if dataset.split == "test" else []))
