from __future__ import annotations

import dataclasses
import io
import time
from pathlib import Path

import pytest
import rich.console

from hrm_text.train.console import Console, duration
from hrm_text.train.hooks import CheckpointRecord, EvaluationRecord, RunInfo, RunSummary, StepRecord, ValidationRecord

RECORD = StepRecord(
    step=1, total_steps=100, epoch=2, loss=0.4213, token_accuracy=0.9, exact_accuracy=0.5, lr=2.2e-4, k=4, tokens=100,
    supervised=40, tokens_per_second=12345.0, mfu=0.412, memory_bytes=3 * 2**29, skipped=0, seconds=1.0,
)  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(hook: Console, clock: Clock, folder: Path, steps: int = 100, start: int = 0) -> None:
    hook.on_start(RunInfo(folder, start, 100, parameters=1234567, device="cpu", config={}))
    for step in range(start + 1, steps + 1):
        clock.now += 1.0
        hook.on_step(dataclasses.replace(RECORD, step=step))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


def test_a_log_gets_a_line_now_and_then_and_the_last_step(clock: Clock, log: io.StringIO) -> None:
    hook = Console(rich.console.Console(file=log, width=40), seconds_per_line=30, clock=clock)
    run(hook, clock, Path("runs/[a]"))
    hook.on_end(RunSummary(100, 100, "finished", 100.0, Path("runs/[a]/step_00000100")))
    lines = log.getvalue().splitlines()
    assert lines[0] == "training 1,234,567 parameters on cpu, steps 1 to 100, in runs/[a]"
    assert lines[1] == "first step after 1.0 s"
    assert [line.split()[1] for line in lines[2:-1]] == ["30/100", "60/100", "90/100", "100/100"]
    assert lines[2] == (
        "step 30/100  epoch 2  loss 0.4213  exact 50.0%  12,345 tokens/s  mfu 41.2%  K 4  lr 2.20e-04  "
        "1.5 GiB  ETA 1:10"
    )


def test_the_time_left_counts_from_where_the_run_was_resumed(clock: Clock, log: io.StringIO) -> None:
    hook = Console(rich.console.Console(file=log), seconds_per_line=10, clock=clock)
    clock.now = 1000.0
    run(hook, clock, Path("runs"), start=80, steps=90)
    assert log.getvalue().splitlines()[-1].endswith("ETA 0:10")


def test_a_terminal_shows_the_last_step_live(clock: Clock, log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    hook = Console(rich.console.Console(file=log, force_terminal=True, width=120), clock=clock)
    run(hook, clock, Path("runs"), steps=40)
    hook.on_checkpoint(CheckpointRecord(40, Path("runs/step_00000040"), 0.26, 3.0))
    deadline = time.monotonic() + 10
    while "40/100 40%" not in log.getvalue():  # drawn by a thread, four times a second
        assert time.monotonic() < deadline, log.getvalue()
        time.sleep(0.02)
    assert "saved runs/step_00000040" in log.getvalue()
    hook.on_end(RunSummary(40, 100, "interrupted", 40.0, Path("runs/step_00000040")))
    assert "\x1b[?25h" in log.getvalue()  # the cursor is back
    *_, figures, ending = log.getvalue().splitlines()
    assert "step 40/100  epoch 2  loss 0.4213" in figures
    assert ending.endswith("interrupted after 40 of 100 steps in 0:40; continue from runs/step_00000040")


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    clock: Clock, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    hook = Console(rich.console.Console(file=log, force_terminal=True), seconds_per_line=30, clock=clock)
    run(hook, clock, Path("runs"), steps=40)
    assert "step 30/100" in log.getvalue()


def test_validation_and_messages_are_lines_of_their_own(clock: Clock, log: io.StringIO) -> None:
    hook = Console(rich.console.Console(file=log, width=20), clock=clock)
    hook.on_validation(ValidationRecord(50, "ema", 0.5, 0.75, 0.5, samples=1000, supervised=80, seconds=1.0))
    scores = {"add": {"strict": 0.5}, "gsm8k": {"strict": 0.025}}
    hook.on_evaluation(EvaluationRecord(50, "ema", 1200, scores, seconds=12.3, share=0.0123))
    hook.on_message("warning", "step 7 was skipped: its loss was not finite")
    hook.on_message("info", "hello")
    hook.on_end(RunSummary(100, 100, "finished", 3700.0, Path("x")))
    assert log.getvalue().splitlines() == [
        "step 50: validation loss 0.5000, tokens right 75.0%, whole responses 50.0% of 1,000 (ema weights)",
        "step 50: evaluation mean 26.2% (add 50.0%, gsm8k 2.5%); 1,200 questions in 12.3 s, 1.2% of the run so far "
        "(ema weights)",
        "warning: step 7 was skipped: its loss was not finite",
        "hello",
        "finished after 100 of 100 steps in 1:01:40",
    ]


def test_duration() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3599, 3600, 90061)] == [
        "0:00",
        "1:00",
        "1:01",
        "59:59",
        "1:00:00",
        "25:01:01",
    ]
