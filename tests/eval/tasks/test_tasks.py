from __future__ import annotations

import json
from pathlib import Path

import pytest

from hrm_text.contracts import UserError
from hrm_text.data.procedural import CPU_WEIGHTS, TASKS
from hrm_text.eval.tasks import load_tasks, task_names


def test_names_select_generators_conditions_families_and_files(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"condition": "cot", "instruction": "Why?", "response": "So."}) + "\n")
    tasks = load_tasks(["add:direct", "reverse", str(path)], limit=3)
    assert [task.name for task in tasks] == ["add:direct", "reverse", str(path)]
    assert [len(task.items) for task in tasks] == [3, 3, 1]
    assert {item.condition for item in tasks[0].items} == {"direct"}
    assert [task.name for task in load_tasks(["quickstart"], limit=1)] == list(CPU_WEIGHTS)
    assert set(task_names()) == {"quickstart", "procedural", *TASKS}


def test_a_name_given_twice_is_one_task() -> None:
    names = [task.name for task in load_tasks(["reverse", "quickstart", "reverse"], limit=1)]
    assert sorted(names) == sorted(CPU_WEIGHTS)
    assert names[0] == "reverse"


def test_an_unknown_task_suggests_and_lists() -> None:
    with pytest.raises(UserError, match=r"unknown task 'revers': did you mean 'reverse'\?") as caught:
        load_tasks(["revers"])
    for name in task_names():
        assert name in str(caught.value)
    with pytest.raises(UserError, match=r"unknown task 'xyzzy:cot': The tasks are quickstart, procedural, add"):
        load_tasks(["xyzzy:cot"])


@pytest.mark.parametrize("name", ["reverse:cot", "reverse:", "add:quick"])
def test_an_unknown_condition_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"has no condition '\w*'; its tags are"):
        load_tasks([name])


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(UserError, match=f"limit: expected at least 1 item per task, found {limit}"):
        load_tasks(["reverse"], limit=limit)
