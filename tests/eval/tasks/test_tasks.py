from __future__ import annotations

import json
from pathlib import Path

import pytest

from hrm_text.contracts import UserError
from hrm_text.data.procedural import CPU_WEIGHTS, TASKS
from hrm_text.eval import tasks as registry
from hrm_text.eval.exact import given_questions
from hrm_text.eval.scoring.letters import score_last_letter
from hrm_text.eval.tasks import FAMILIES, benchmarks, find_tasks, task_names


def test_names_select_generators_conditions_families_and_files(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"condition": "cot", "instruction": "Why?", "response": "So."}) + "\n")
    tasks = find_tasks(["add:direct", "reverse", str(path)], limit=3)
    assert [task.name for task in tasks] == ["add:direct", "reverse", str(path)]
    assert [len(given_questions(task)) for task in tasks] == [3, 3, 1]
    assert [task.condition for task in tasks] == ["direct", "direct", "cot"]
    assert [task.name for task in find_tasks(["quickstart"], limit=1)] == list(CPU_WEIGHTS)
    assert {*FAMILIES, *TASKS, *FAMILIES["published"], "arc", "arc_easy"} <= set(task_names())


@pytest.mark.parametrize("name", benchmarks())
def test_a_benchmark_is_prompts_a_scorer_and_metadata(name: str) -> None:
    file = Path(registry.__file__).with_name(f"{name}.py")
    assert len(file.read_text().splitlines()) <= 40


def test_a_name_given_twice_is_one_task() -> None:
    names = [task.name for task in find_tasks(["reverse", "quickstart", "reverse"], limit=1)]
    assert sorted(names) == sorted(CPU_WEIGHTS)
    assert names[0] == "reverse"


def test_an_unknown_task_suggests_and_lists() -> None:
    with pytest.raises(UserError, match=r"unknown task 'revers': did you mean 'reverse'\?") as caught:
        find_tasks(["revers"])
    for name in task_names():
        assert name in str(caught.value) or "/" in name  # of a family with hundreds the family's name
    with pytest.raises(
        UserError, match=r"unknown task 'xyzzy:cot': The tasks are quickstart, procedural, published, add"
    ):
        find_tasks(["xyzzy:cot"])


@pytest.mark.parametrize("name", ["reverse:cot", "reverse:", "add:quick"])
def test_an_unknown_condition_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"has no condition '\w*'; its tags are"):
        find_tasks([name])


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(UserError, match=f"limit: expected at least 1 item per task, found {limit}"):
        find_tasks(["reverse"], limit=limit)


def test_every_benchmark_is_found_by_its_name_under_its_own_or_a_named_condition() -> None:
    assert [task.name for task in find_tasks(["published"])] == list(FAMILIES["published"])
    assert {task.name for task in find_tasks(["arc"])} == {"arc_challenge", "arc_easy"}
    usual, direct = find_tasks(["gsm8k", "gsm8k:direct"])
    assert (usual.condition, direct.condition) == ("synth,cot", "direct")
    assert find_tasks(["gsm8k:synth+cot"]) == [usual]


def test_a_grid_asks_the_same_questions_under_every_condition() -> None:
    direct, cot, *rest = find_tasks(["add", "sub"], conditions=["direct", "cot"], limit=5)
    assert [(task.name, task.condition) for task in (direct, cot, *rest)] == [
        ("add", "direct"), ("add", "cot"), ("sub", "direct"), ("sub", "cot"),
    ]  # fmt: skip
    asked = [[(each.id, each.prompt, each.answer) for each in task.questions(lambda _: [])] for task in (direct, cot)]
    assert asked[0] == asked[1]
    assert direct.max_new_tokens < cot.max_new_tokens
    with pytest.raises(UserError, match=r"'add:cot' names a condition, and so does --conditions"):
        find_tasks(["add:cot"], conditions=["direct"])
    with pytest.raises(UserError, match=r"unknown condition tag 'dirct'"):
        find_tasks(["gsm8k"], conditions=["dirct"])


def test_records_keep_the_conditions_they_have_unless_a_grid_gives_others(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    records = [{"condition": each, "instruction": each, "response": "yes"} for each in ("cot", "direct")]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    [own] = find_tasks([str(path)])
    assert [question.condition for question in own.questions(lambda _: [])] == ["cot", "direct"]
    [given] = find_tasks([str(path)], conditions=["noisy"])
    assert (given.condition, [question.condition for question in given.questions(lambda _: [])]) == ("noisy", ["", ""])
    first, second = own.questions(lambda _: [])
    assert [own.score(text, first).strict for text in (" yes\n", "no", "")] == [1, 0, 0]
    assert not own.score("", second).readable


def test_with_working_to_show_the_letter_comes_last() -> None:
    [direct] = find_tasks(["boolq"])
    direct_again, cot = find_tasks(["boolq"], conditions=["direct", "synth,cot"])
    assert direct == direct_again and direct.max_new_tokens == 1
    assert cot.max_new_tokens == cot.context and cot.score is score_last_letter
