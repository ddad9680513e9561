"""The tasks beyond the published protocol: IFEval, BBH, HumanEval and reasoning-gym."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from hrm_text.contracts import UserError
from hrm_text.data.procedural.split import is_held_out
from hrm_text.data.sources.reasoning_gym import TASKS as TRAINED
from hrm_text.eval import gym
from hrm_text.eval.answers import Answer
from hrm_text.eval.scores import answered, score_task
from hrm_text.eval.scoring.code import require_isolation
from hrm_text.eval.scoring.stated import answer_in
from hrm_text.eval.sources import LocalRows
from hrm_text.eval.subtasks import BBH, REASONING_GYM
from hrm_text.eval.task import Question, Scored
from hrm_text.eval.tasks import bbh, humaneval, ifeval, reasoning_gym

EXECUTES = re.compile(r"(^|\.)(eval|exec|parse_expr|sympify)$")
FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def rows() -> LocalRows:
    return LocalRows(FIXTURES)


def test_ifeval_judges_prompts_and_instructions_strictly_and_loosely(rows: LocalRows) -> None:
    questions = {question.id: question for question in ifeval.TASK.questions(rows)}
    assert list(questions) == ["1000", "1001", "1002"]
    assert questions["1000"].prompt == "Write a line about the moon without a comma."
    right = "A stone lies there. So it flows."
    assert ifeval.TASK.score(right, questions["1002"]).strict == 1
    framed = ifeval.TASK.score(f"Sure:\n{right}\nBye", questions["1002"])
    assert framed.strict == framed.published == 0
    assert framed.also == {"prompt, loose": 1.0}
    assert framed.counts == {"instruction, strict": (2, 3), "instruction, loose": (3, 3)}
    half = ifeval.TASK.score("* a\n* b", questions["1001"])
    assert (half.strict, half.got, half.counts["instruction, strict"]) == (
        0,
        "detectable_format:number_bullet_lists",
        (1, 2),
    )
    assert not ifeval.TASK.score(" ", questions["1000"]).readable


def test_ifevals_instructions_weigh_alike_whichever_prompt_they_are_of(rows: LocalRows) -> None:
    """A prompt's one instruction followed and none of another's three: a quarter of all, not a half."""
    questions = {question.id: question for question in ifeval.TASK.questions(rows)}
    said = {"1000": "The moon is round.", "1002": "river " * 30}
    results = [answered(ifeval.TASK, questions[id_], [Answer(text, 5, "stop")]) for id_, text in said.items()]
    found = score_task(ifeval.TASK, results, "unknown", 0.0)
    assert found.strict == found.also["prompt, loose"] == 0.5
    assert found.also["instruction, strict"] == found.also["instruction, loose"] == 0.25


def test_bbh_asks_all_rows_but_the_examples_of_every_subtask(rows: LocalRows) -> None:
    questions = list(bbh.TASK.questions(rows))
    assert len(BBH) == len(set(BBH)) == 27
    assert Counter(question.subject for question in questions) == dict.fromkeys(BBH, 2)
    first = questions[0]
    assert first.prompt.count("Q: ") == 4 and first.prompt.endswith(" is\nA:")
    assert [each.count("Q: ") for each in first.shorter] == [2, 1]
    asked = {question.prompt.rpartition("Q: ")[2] for question in questions if question.subject == "word_sorting"}
    shown = {
        part.split("A: ")[0] for q in questions if q.subject == "word_sorting" for part in q.prompt.split("Q: ")[1:-1]
    }
    assert not asked & shown
    for question in questions:
        assert bbh.TASK.score(question.answer, question) == Scored(
            1, 1, answer_in(question.answer, question.answer), True
        )
        assert bbh.TASK.score("Z9", question).strict == 0


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("(B)", "(B)"),
        ("B", "(B)"),
        ("B.", "(B)"),
        ("(B) lamp", "(B)"),
        ("It is not (A), as (C) says.\nSo the answer is (B).", "(B)"),
        (r"Hence \boxed{(B)}", "(B)"),
        (r"Hence \boxed{\text{B}}", "(B)"),
        ("(B)\n\nQ: Which?\nA: (C)", "(B)"),
        ("true", "True"),
        ("not True is False.\nThe answer is: **False**.", "False"),
        ("Yes.", "Yes"),
        ("Answer: invalid", "invalid"),
        (r"$\boxed{-1,024}$", "-1024"),
        ("-12", "-12"),
        ("] } >", "] } >"),
        ("  ]  } >\n", "] } >"),
        ("apple, cloud, door", "apple cloud door"),
        ("Sorted: \nApple cloud door", "apple cloud door"),
    ],
)
def test_bbh_reads_answers(response: str, right: str) -> None:
    assert bbh.TASK.score(response, Question("x/0", "", right)).strict == 1


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("", "(B)"),
        ("A lamp", "(A)"),
        ("b", "(B)"),
        ("(B) or (A)", "(A)"),
        ("True or False", "True"),
        ("12", "-12"),
        ("the answer is 1 or 2", "1"),
        ("] >", "] } >"),
        ("apple door cloud", "apple cloud door"),
        ("valid", "invalid"),
    ],
)
def test_bbh_takes_no_other_answer_for_right(response: str, right: str) -> None:
    assert bbh.TASK.score(response, Question("x/0", "", right)).strict == 0


def test_humaneval_passes_its_solutions_and_no_others(rows: LocalRows) -> None:
    try:
        require_isolation()
    except UserError as error:
        pytest.skip(str(error))
    assert humaneval.TASK.runs_code
    solutions = [
        json.loads(line)["canonical_solution"] for line in (FIXTURES / "humaneval/test.jsonl").read_text().splitlines()
    ]
    questions = list(humaneval.TASK.questions(rows))
    for question, solution in zip(questions, solutions, strict=True):
        assert question.prompt.endswith('"""\n')
        assert humaneval.TASK.score(solution, question) == Scored(1, 1, "passed", True)
    assert humaneval.TASK.score("    return None", questions[0]).strict == 0
    unreadable = humaneval.TASK.score("I do not know.", questions[0])
    assert (unreadable.strict, unreadable.readable) == (0, False)


def test_humaneval_asks_nothing_that_could_not_be_scored(rows: LocalRows, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UserError("no namespaces here")

    monkeypatch.setattr(humaneval, "require_isolation", refuse)
    with pytest.raises(UserError, match="no namespaces here"):
        next(iter(humaneval.TASK.questions(rows)))


def test_reasoning_gym_tasks_have_names_and_levels_without_the_package() -> None:
    names = [task.name for task in reasoning_gym.TASKS]
    assert len(names) == len(set(names)) == 1 + 4 * len(REASONING_GYM)
    assert {"reasoning_gym", "reasoning_gym/gcd/0", "reasoning_gym/zebra_puzzles/3"} <= set(names)
    assert set(TRAINED) <= set(REASONING_GYM)


@pytest.fixture
def _installed() -> None:
    pytest.importorskip("reasoning_gym")
    gym.drawn.cache_clear()


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("name", ["gcd", "family_relationships", "word_sorting", "prime_factorization"])
def test_reasoning_gym_asks_different_problems_that_no_mixture_trains_on(name: str, rows: LocalRows) -> None:
    task = next(task for task in reasoning_gym.TASKS if task.name == f"reasoning_gym/{name}/1")
    questions = list(task.questions(rows))
    key = TRAINED.get(name, lambda question, answer: question)
    keys = {key(question.prompt, question.answer) for question in questions}
    assert len(keys) == len(questions) == len({question.id for question in questions}) > 50
    assert all(is_held_out(f"reasoning_gym/{name}", each) for each in keys)
    for question in questions[:20]:
        assert json.loads(json.dumps(question.answer)) == question.answer
        assert task.score(question.answer, question).strict == 1
        assert task.score(rf"It is \boxed{{{question.answer}}}.", question).strict == 1
        assert task.score("nonsense", question).strict == task.score("", question).strict == 0


@pytest.mark.usefixtures("_installed")
def test_part_of_the_points_is_worth_nothing() -> None:
    question = next(iter(gym.held_out("word_sorting", 0, 1)))
    items = gym.drawn("word_sorting", 0)
    partial = ", ".join(reversed(question.answer.split(", ")))
    entry = items[int(question.id.split("/")[2])]
    assert 0 < items.score_answer(partial, entry) < 1
    assert gym.score(partial, question).strict == 0


@pytest.mark.usefixtures("_installed")
def test_no_scorer_of_reasoning_gym_that_is_used_executes_a_response() -> None:
    datasets = importlib.import_module("reasoning_gym.factory").DATASETS
    executing = set()
    for name, (kind, _) in datasets.items():
        tree = ast.parse(inspect.getsource(inspect.getmodule(kind)))  # type: ignore[arg-type]
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name == "score_answer":
                calls = [call for call in ast.walk(function) if isinstance(call, ast.Call)]
                if any(EXECUTES.search(ast.unparse(call.func)) and "answer" in ast.unparse(call) for call in calls):
                    executing.add(name)
    assert {"n_queens", "countdown", "simple_integration"} <= executing
    # This one executes the stored answer, which is its own.
    assert executing & set(REASONING_GYM) <= {"number_sorting"}


@pytest.mark.usefixtures("_installed")
def test_a_level_that_is_not_there_is_told(rows: LocalRows) -> None:
    task = next(task for task in reasoning_gym.TASKS if task.name == "reasoning_gym/survo/3")
    with pytest.raises(UserError, match="reasoning_gym/survo/3: there is no such level"):
        list(task.questions(rows))


def test_without_the_package_the_extra_is_named(rows: LocalRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym.factory", None)
    gym.drawn.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'hrm-text\[gpu-preset\]'"):
        list(reasoning_gym.TASKS[0].questions(rows))
