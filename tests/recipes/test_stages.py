from __future__ import annotations

import io
from pathlib import Path

import pytest
import rich.console

from hrm_text.contracts import UserError
from hrm_text.files import read_json
from hrm_text.recipes.display import Display
from hrm_text.recipes.stages import Progress, Stage

SETTINGS = {"seed": 0, "preset": {"examples": 10}}


class Work:
    """Two stages that note when they are done; one may fail."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failing: str | None = None

    def stage(self, name: str) -> Stage:
        def work(display: Display) -> str:
            if self.failing == name:
                raise KeyboardInterrupt
            self.done.append(name)
            return f"made {name}"

        return Stage(name, work)

    def run(self, folder: Path) -> tuple[Progress, str]:
        told = io.StringIO()
        progress = Progress(folder, SETTINGS)
        display = Display(("dough", "bread"), rich.console.Console(file=told, width=80))
        progress.run([self.stage("dough"), self.stage("bread")], display)
        return progress, told.getvalue()


def test_every_stage_is_done_once_in_order(tmp_path: Path) -> None:
    work = Work()
    first, told = work.run(tmp_path / "out")
    assert work.done == ["dough", "bread"]
    assert "dough: made dough [" in told
    assert read_json(tmp_path / "out" / "progress.json")["settings"] == SETTINGS
    again, told = work.run(tmp_path / "out")
    assert work.done == ["dough", "bread"]
    assert "bread: made bread (done before) [" in told
    assert again.finished == first.finished
    assert list(again.finished) == ["dough", "bread"]


def test_an_interrupted_stage_is_done_again_and_remembers_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr("hrm_text.recipes.stages.time.monotonic", lambda: float(next(now)))
    work = Work()
    work.failing = "bread"
    with pytest.raises(KeyboardInterrupt):
        work.run(tmp_path)
    assert work.done == ["dough"]
    saved = read_json(tmp_path / "progress.json")
    assert list(saved["finished"]) == ["dough"]
    assert saved["spent"]["bread"] > 0
    work.failing = None
    progress, _ = work.run(tmp_path)
    assert work.done == ["dough", "bread"]
    assert progress.finished["bread"]["seconds"] > saved["spent"]["bread"]


def test_other_settings_in_the_same_folder_are_an_error(tmp_path: Path) -> None:
    Work().run(tmp_path)
    with pytest.raises(UserError, match=r"other settings: seed was 0 and is 1\. Choose another folder with --out"):
        Progress(tmp_path, SETTINGS | {"seed": 1})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        Progress(tmp_path, SETTINGS)
    with pytest.raises(UserError, match="is a file"):
        Progress(tmp_path / "letter.txt", SETTINGS)


def test_what_a_kill_leaves_of_the_first_save_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".progress.json.123.tmp").write_text("{")
    work = Work()
    work.run(tmp_path)
    assert work.done == ["dough", "bread"]
