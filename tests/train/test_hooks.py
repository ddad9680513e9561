from __future__ import annotations

import dataclasses
import importlib
import json
import math
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hrm_text.contracts import UserError
from hrm_text.train.hooks import (
    CheckpointRecord,
    EvaluationRecord,
    Hook,
    Hooks,
    JsonlMetrics,
    Level,
    RunInfo,
    RunSummary,
    StepRecord,
    TensorBoard,
    ValidationRecord,
    WandB,
)


def info(folder: Path, start_step: int = 0) -> RunInfo:
    return RunInfo(folder, start_step, total_steps=10, parameters=1000, device="cpu", config={"seed": 0})


def step_record(step: int, **changes: Any) -> StepRecord:
    record = StepRecord(
        step=step, total_steps=10, epoch=0, loss=1 / step, token_accuracy=0.5, exact_accuracy=0.25, lr=1e-3, k=2,
        tokens=100, supervised=40, tokens_per_second=1000.0, mfu=None, memory_bytes=2**30, skipped=0, seconds=0.1,
    )  # fmt: skip
    return dataclasses.replace(record, **changes)


def validation_record(step: int) -> ValidationRecord:
    return ValidationRecord(step, "ema", 0.5, 0.75, 0.5, samples=8, supervised=80, seconds=1.0)


def evaluation_record(step: int, **changes: float) -> EvaluationRecord:
    scores = {"gsm8k": {"strict": 0.25, "mean_tokens": 30.5} | changes, "add": {"strict": 0.5}}
    return EvaluationRecord(step, "ema", 200, scores, seconds=2.0, share=0.01)


SUMMARY = RunSummary(step=10, total_steps=10, outcome="finished", seconds=1.0, checkpoint=None)


def run(hook: Hook, folder: Path, start: int, stop: int) -> None:
    """Steps start + 1 to stop, with a validation after every second one."""
    hook.on_start(info(folder, start))
    for step in range(start + 1, stop + 1):
        hook.on_step(step_record(step))
        if step % 2 == 0:
            hook.on_validation(validation_record(step))
        if step % 5 == 0:
            hook.on_evaluation(evaluation_record(step))
    hook.on_end(SUMMARY)


class Heard(Hook):
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.messages: list[tuple[Level, str]] = []

    def on_start(self, info: RunInfo) -> None:
        self.calls.append("start")

    def on_step(self, record: StepRecord) -> None:
        self.calls.append(f"step {record.step}")

    def on_message(self, level: Level, text: str) -> None:
        self.messages.append((level, text))

    def on_end(self, summary: RunSummary) -> None:
        self.calls.append("end")


class Raising(Hook):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_step(self, record: StepRecord) -> None:
        raise self.error

    def on_message(self, level: Level, text: str) -> None:
        raise self.error


# --- Hooks


def test_a_failing_hook_warns_once_and_stops_neither_the_run_nor_the_others(tmp_path: Path) -> None:
    heard = Heard()
    hooks = Hooks([Raising(RuntimeError("no luck")), heard])
    run(hooks, tmp_path, 0, 3)
    assert heard.calls == ["start", "step 1", "step 2", "step 3", "end"]
    [(level, text)] = heard.messages
    assert level == "warning"
    assert "Raising failed in on_step: no luck; training goes on" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupt_passes(error: BaseException) -> None:
    with pytest.raises(type(error)):
        Hooks([Raising(error)]).on_step(step_record(1))


def test_every_event_reaches_every_hook(tmp_path: Path) -> None:
    events = {name for name in vars(Hook) if name.startswith("on_")}
    assert events == {name for name in vars(Hooks) if name.startswith("on_")}
    arguments: dict[str, tuple[Any, ...]] = {
        "on_start": (info(tmp_path),), "on_step": (step_record(1),), "on_validation": (validation_record(1),),
        "on_evaluation": (evaluation_record(1),),
        "on_checkpoint": (CheckpointRecord(1, tmp_path, 0.0, 0.1),),
        "on_message": ("info", "hello"), "on_end": (SUMMARY,),
    }  # fmt: skip

    class Recorder(Hook):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                return lambda *values: heard.append((name, values))
            return super().__getattribute__(name)

    heard: list[tuple[str, tuple[Any, ...]]] = []
    hooks = Hooks([Recorder(), Recorder()])
    for name in sorted(events):
        getattr(hooks, name)(*arguments[name])
        assert heard[-2:] == [(name, arguments[name])] * 2


# --- JsonlMetrics


def test_a_record_becomes_one_line_at_once(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "metrics.jsonl"
    hook = JsonlMetrics(path)
    hook.on_start(info(tmp_path))
    hook.on_step(step_record(1, loss=math.nan))
    line = json.loads(path.read_text())  # before the file is closed
    assert line == {"kind": "step", **dataclasses.asdict(step_record(1)), "loss": None}
    hook.on_validation(validation_record(1))
    hook.on_evaluation(evaluation_record(1, published=math.nan))
    hook.on_end(SUMMARY)
    validation, evaluation = (json.loads(line) for line in path.read_text().splitlines()[1:])
    assert validation["kind"] == "validation"
    assert evaluation["kind"] == "evaluation"
    assert evaluation["scores"]["gsm8k"] == {"strict": 0.25, "mean_tokens": 30.5, "published": None}


@pytest.mark.parametrize(
    "torn", [b"", b'{"kind": "step", "st', b'{"kind": "step", "step": 4}', b"\x00\xff\n", b"[1]\n"]
)
@pytest.mark.parametrize("checkpoint_step", [0, 3, 4])
def test_a_resumed_file_is_that_of_an_uninterrupted_run(tmp_path: Path, checkpoint_step: int, torn: bytes) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    run(JsonlMetrics(whole), tmp_path, 0, 10)
    run(JsonlMetrics(resumed), tmp_path, 0, 7)
    with resumed.open("ab") as file:
        file.write(torn)
    run(JsonlMetrics(resumed), tmp_path, checkpoint_step, 10)
    assert resumed.read_bytes() == whole.read_bytes()
    assert len(whole.read_bytes().splitlines()) == 17


def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom hrm_text.train.hooks import *\n"
        "hook = JsonlMetrics(Path(sys.argv[1]))\n"
        "hook.on_start(RunInfo(Path('.'), 0, 10, 1000, 'cpu', {}))\n"
        "for step in (1, 2, 3): hook.on_validation(ValidationRecord(step, 'ema', 0.5, 0.5, 0.5, 1, 1, 1.0))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "metrics.jsonl"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_full_disk_warns_once_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    heard = Heard()
    hooks = Hooks([JsonlMetrics(path), heard])
    hooks.on_start(info(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the fourth line does not fit
    try:
        for step in range(1, 9):
            hooks.on_step(step_record(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    hooks.on_step(step_record(9))  # there is room again
    hooks.on_end(SUMMARY)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 3, 9]
    [(level, text)] = heard.messages
    assert level == "warning"
    assert "JsonlMetrics failed in on_step" in text
    assert str(path) in text


def test_a_place_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    heard = Heard()
    run(Hooks([JsonlMetrics(tmp_path / "file" / "metrics.jsonl"), heard]), tmp_path, 0, 3)
    assert len(heard.messages) == 1
    assert heard.calls[-2:] == ["step 3", "end"]


# --- TensorBoard


def test_tensorboard_holds_the_scalars_of_both_halves_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
    for start, stop in ((0, 5), (3, 8)):
        # Files are read in the order of their names, and of two in one second the name of a process's tenth comes
        # before that of its ninth.
        later = SimpleNamespace(time=lambda seconds=start: time.time() + seconds, sleep=time.sleep)
        monkeypatch.setattr(writer, "time", later)
        hook = TensorBoard(tmp_path / "tb")
        hook.on_start(info(tmp_path, start))
        for step in range(start + 1, stop + 1):
            hook.on_step(step_record(step, loss=math.inf if step == 2 else start + step))
        hook.on_validation(validation_record(stop))
        hook.on_evaluation(evaluation_record(stop))
        hook.on_end(SUMMARY)
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")  # without types
    events = reader.EventAccumulator(str(tmp_path / "tb")).Reload()
    loss = {event.step: event.value for event in events.Scalars("train/loss")}
    assert loss == {1: 1, 3: 3, 4: 7, 5: 8, 6: 9, 7: 10, 8: 11}  # step 2 was not finite; 4 and 5 are of the second
    assert [event.step for event in events.Scalars("validation_ema/exact_accuracy")] == [8]
    assert [(event.step, event.value) for event in events.Scalars("evaluation_ema/gsm8k/strict")] == [(8, 0.25)]
    assert [event.value for event in events.Scalars("evaluation_ema/seconds")] == [2.0]
    assert "evaluation_ema/questions" not in events.Tags()["scalars"]
    assert "train/step" not in events.Tags()["scalars"]
    assert "train/mfu" not in events.Tags()["scalars"]


# --- WandB


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        def finish(self, exit_code: int) -> None:
            calls.append(exit_code)

    def init(**options: Any) -> Run:
        calls.append(options)
        return Run()

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_resumes_the_run_that_it_began(tmp_path: Path, fake_wandb: list[Any]) -> None:
    for start in (0, 3, 0):
        hook = WandB(project="hrm")
        run(hook, tmp_path, start, start + 1)
    logged = WandB(project="hrm")
    logged.on_start(info(tmp_path))
    logged.on_evaluation(evaluation_record(4))
    assert fake_wandb.pop()[1]["evaluation_ema/add/strict"] == 0.5
    begun, (step, values), code, resumed, *_ = fake_wandb
    fresh = [call for call in fake_wandb if isinstance(call, dict)][2]
    assert begun["project"] == "hrm"
    assert begun["config"] == {"seed": 0}
    assert (step, values["train/loss"], code) == (1, 1.0, 0)
    assert begun["id"] == resumed["id"] != fresh["id"]


def test_wandb_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'hrm-text\[wandb\]'"):
        WandB(project="hrm")


def test_importing_the_hooks_loads_no_logging_library() -> None:
    code = "import sys, hrm_text.train.hooks; print([m for m in ('tensorboard', 'wandb') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
