from __future__ import annotations

import dataclasses
import io
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import rich.console

from hrm_text import cli, load
from hrm_text.contracts import UserError
from hrm_text.data.procedural import CPU_WEIGHTS, find_task, is_held_out
from hrm_text.data.procedural.mixture import draw, draw_examples
from hrm_text.data.procedural.rendering import render
from hrm_text.data.records import BadRecords, read_records
from hrm_text.eval.exact import given_questions
from hrm_text.files import read_json, sha256
from hrm_text.recipes import presets
from hrm_text.recipes.quickstart import Quickstart, quickstart
from hrm_text.settings import from_mapping
from hrm_text.train.step import TrainingStep

STAGES = ["records", "tokenizer", "tokenise", "sample", "test before", "train", "export", "test after", "report"]

TINY = dataclasses.replace(
    presets.PRESETS["cpu"],
    examples=900,
    held_out_examples=60,
    items_per_task=3,
    items_before=1,
    model={
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 16,
        "inner_multiple": 16,
        "H_cycles": 2,
        "L_cycles": 2,
    },
    tokens_per_batch=1024,
    learning_rate={"peak": 1e-2, "warmup_steps": 5},
    validate_every=10,
    save_every=5,
)


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "cpu", TINY)
        yield


@dataclasses.dataclass
class Finished:
    out: Path
    stdout: str
    stderr: str

    @property
    def job(self) -> Quickstart:
        return Quickstart(TINY, self.out)


def run(out: Path, *options: str) -> Finished:
    """``hrm-text quickstart``, in this process."""
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        code = cli.main(["quickstart", "--out", str(out), *options])
    assert code == 0, stderr.getvalue()
    return Finished(out, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run(tmp_path_factory.mktemp("quickstart") / "out [1]", "--json")


def test_it_leaves_every_file_it_tells_of(finished: Finished) -> None:
    out = finished.out
    assert {path.name for path in out.iterdir()} == {
        "evaluation", "progress.json", "records", "report.html", "results", "sampled", "store", "tokenizer", "train",
        "weights",
    }  # fmt: skip
    assert {path.stem for path in (out / "records" / "train").iterdir()} == CPU_WEIGHTS.keys()
    assert {path.stem for path in (out / "records" / "held_out").iterdir()} == CPU_WEIGHTS.keys()
    assert {path.name for path in (out / "train").iterdir()} == {
        "checkpoints", "config.yaml", "metrics.jsonl", "tensorboard",
    }  # fmt: skip
    assert {path.name for path in (out / "evaluation").iterdir()} == {"after", "before"}
    assert {path.stem for path in (out / "results").iterdir()} == {
        "norms_after", "norms_before", "run", "train",
    }  # fmt: skip
    assert "quickstart" in (out / "report.html").read_text()
    for path in ("report.html", "weights"):
        assert f"{out / path}" in finished.stderr
    assert f"hrm-text generate {out / 'weights'} --condition cot --prompt '57 + 38'" in finished.stderr
    lines = finished.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines if line.partition(":")[0] in STAGES] == STAGES


def test_json_is_one_object_of_what_came_out(finished: Finished) -> None:
    outcome = json.loads(finished.stdout)
    assert outcome.keys() == {"title", "seconds", "parameters", "tokens_seen", "stages", "tasks"}
    assert [stage["name"] for stage in outcome["stages"]] == STAGES[:-1]
    asked = {(task["task"], task["condition"]) for task in outcome["tasks"]}
    assert {task for task, _ in asked} == CPU_WEIGHTS.keys()
    assert {("add", "cot"), ("add", "direct")} <= asked
    for task in outcome["tasks"]:
        assert 0 < task["n"] <= 3
        assert 0 <= task["low"] <= task["after"] <= task["high"] <= 1
        assert 0 <= task["before"] <= 1 and 0 <= task["chance"] <= 1


def test_the_results_hold_all_that_the_report_shows(finished: Finished) -> None:
    result = read_json(finished.out / "results" / "run.json")
    steps = [record["step"] for record in result["steps"]]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 20
    assert [record["step"] for record in result["validation"]][:2] == [10, 20]
    assert result["steps"][-1]["loss"] < 0.8 * result["steps"][0]["loss"]
    assert {record["k"] for record in result["steps"]} == {2, 3, 4, 5}
    assert [norm["call"] for norm in result["state_norms"]] == ["L1", "L2", "H1", "L3", "L4", "H2"]
    assert all(pair["direct"] and pair["cot"] for pair in result["direct_vs_cot"])
    assert result["tokens_seen"] == sum(record["tokens"] for record in result["steps"])
    assert result["config"]["preset"]["examples"] == 900
    assert result["config"]["train"]["model"]["vocab_size"] == 512
    assert {"torch", "numpy", "hrm-text"} <= result["versions"].keys()


def test_the_weights_answer_and_their_card_has_the_scores(finished: Finished) -> None:
    [answer] = load(finished.out / "weights").generate(["What is 2 + 2?"], condition="cot", max_new_tokens=5)
    assert isinstance(answer, str)
    card = (finished.out / "weights" / "README.md").read_text()
    assert "HRM-Text quickstart (cpu)" in card
    assert "sudoku4" in card


def test_no_held_out_problem_is_in_training_in_any_wording(finished: Finished) -> None:
    tasks = finished.job.tasks
    prompts = {task.name.partition(":")[0]: {each.prompt for each in given_questions(task)} for task in tasks}
    assert prompts.keys() == CPU_WEIGHTS.keys()
    for name in CPU_WEIGHTS:
        task = find_task(name)
        records = list(read_records(finished.out / "records" / "train" / f"{name}.jsonl", BadRecords(strict=True)))
        # The records are those of training problems alone ...
        drawn = itertools.islice(draw_examples({name: 1}, "train 0", held_out=False), len(records))
        keys = set()
        for record, (_, problem, example) in zip(records, drawn, strict=True):
            assert record == example
            keys.add(problem.key)
        assert not any(is_held_out(name, key) for key in keys)
        # ... and the problems asked are others, however they are worded.
        instructions = {record.instruction for record in records}
        rng, found = random.Random("held-out items 0"), 0
        for problem in (draw(task, rng, held_out=True) for _ in range(50)):
            assert problem.key not in keys
            wordings = {
                render(task, problem, "direct", number, rng).instruction for number in range(len(task.wordings))
            }
            assert wordings.isdisjoint(instructions), name
            found += not wordings.isdisjoint(prompts[name])
        assert found >= 3, name  # so these are the problems that were asked


def test_finished_it_shows_the_outcome_again(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()}
    again = run(finished.out)
    assert again.stdout == ""
    assert again.stderr.count("(done before)") == len(STAGES)
    assert "Held-out questions answered right" in again.stderr
    after = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()}
    assert after == before


def test_other_settings_in_the_same_folder_are_an_error(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"other settings: seed was 0 and is 1\. Choose another folder"):
        Quickstart(TINY, finished.out, seed=1)
    with pytest.raises(UserError, match=r"other settings: preset was .* and is "):
        Quickstart(dataclasses.replace(TINY, epochs=2), finished.out)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        Quickstart(TINY, tmp_path)


def test_an_unknown_preset_lists_them() -> None:
    with pytest.raises(UserError, match="unknown preset 'tpu'; the presets are cpu, gpu"):
        quickstart(Path("never"), "tpu", 0, rich.console.Console())


class Interrupted(Exception):
    """Stands for anything that ends the process."""


def test_interrupted_in_every_stage_it_ends_with_the_same_weights(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the worst moment: the work is done and not yet noted; training stops between two checkpoints besides."""
    methods = [
        "make_records", "make_tokenizer", "tokenise", "sample", "evaluate_untrained", "train", "export",
        "evaluate_trained", "report",
    ]  # fmt: skip
    for name in methods:
        monkeypatch.setattr(Quickstart, name, failing_once(getattr(Quickstart, name), after=1))
    monkeypatch.setattr(TrainingStep, "run", failing_once(TrainingStep.run, after=8))
    monkeypatch.setattr("hrm_text.recipes.quickstart.write_report", lambda run, path: path.touch())  # slow to draw
    interruptions = 0
    while True:
        try:
            with redirect_stderr(io.StringIO()):
                quickstart(tmp_path / "out", "cpu", 0, rich.console.Console(stderr=True))
            break
        except Interrupted:
            interruptions += 1
    assert interruptions == len(methods) + 1
    for path in ("tokenizer/tokenizer.json", "sampled/train/tokens.npy", "weights/model.safetensors"):
        assert sha256(tmp_path / "out" / path) == sha256(finished.out / path), path
    found, expected = (read_json(out / "results" / "run.json") for out in (tmp_path / "out", finished.out))
    assert [record["loss"] for record in found["steps"]] == [record["loss"] for record in expected["steps"]]
    for key in ("tasks", "samples", "tokens_seen", "state_norms"):
        assert found[key] == expected[key], key


def failing_once(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    """The function, but its call number ``after`` does its work and then raises."""
    calls = itertools.count(1)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        if next(calls) == after:
            raise Interrupted
        return result

    return wrapped


def test_ctrl_c_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Quickstart, "make_records", interrupted)
    arguments = ["quickstart", "--out", str(tmp_path / "out [2]")]
    monkeypatch.setattr(sys, "argv", ["hrm-text", *arguments])
    assert cli.main(arguments) == 130
    assert f"To continue: hrm-text {' '.join(arguments)}\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", presets.PRESETS)
def test_the_presets_are_complete(name: str, tmp_path: Path) -> None:
    preset = presets.find_preset(name)
    assert preset.name == name
    assert from_mapping(presets.QuickstartPreset, dataclasses.asdict(preset), "test") == preset
    config = Quickstart(preset, tmp_path / "out").train_config
    assert config.optimizer.lr.peak == preset.learning_rate["peak"]
    assert not (tmp_path / "out").exists()
