from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
import rich.console

from hrm_text.recipes.display import Display, sparkline
from hrm_text.train.hooks import CheckpointRecord, RunInfo, StepRecord, ValidationRecord

STAGES = ("records", "train", "report")


def step(number: int, loss: float = 2.0) -> StepRecord:
    return StepRecord(
        step=number, total_steps=100, epoch=0, loss=loss, token_accuracy=0.5, exact_accuracy=0.25, lr=1e-3, k=3,
        tokens=100, supervised=50, tokens_per_second=12_345, mfu=None, memory_bytes=1, skipped=0, seconds=0.1,
    )  # fmt: skip


VALIDATION = ValidationRecord(
    step=50, weights="ema", loss=1.0, token_accuracy=0.8, exact_accuracy=0.62, samples=10, supervised=99, seconds=0.1
)
INFO = RunInfo(folder=Path("x"), start_step=40, total_steps=100, parameters=1, device="cpu", config={})


def on(terminal: bool, seconds_per_line: float = 0.0) -> tuple[Display, io.StringIO]:
    shown = io.StringIO()
    console = rich.console.Console(file=shown, force_terminal=terminal, width=120, color_system=None)
    return Display(STAGES, console, seconds_per_line), shown


def rendered(display: Display) -> str:
    shown = io.StringIO()
    rich.console.Console(file=shown, width=120).print(display.render())
    return shown.getvalue()


def test_a_terminal_shows_what_is_done_what_goes_on_and_what_is_left() -> None:
    display, shown = on(terminal=True)
    with display.shown():
        display.begin("records")
        display.end("records", 3.2, "500 examples")
        display.begin("train")
        display.on_validation(VALIDATION)
        display.on_step(step(1, 5.0))
        display.on_step(step(60, 1.0))
        lines = rendered(display).splitlines()
    assert re.match(r"✓ +records +3\.2 s +500 examples", lines[0])
    assert re.match(
        r"▸ +train +\d+\.\d s +step 60/100 +K 3 +loss 1\.000 +exact 25% +held-out exact 62% +12,345", lines[1]
    )
    assert re.match(r"· +report", lines[2])
    assert re.search(r"60%, 0:0\d left", lines[3])
    assert lines[4].strip() == "loss █▁"
    assert "500 examples" in shown.getvalue()
    assert "\x1b[" in shown.getvalue()  # drawn over and over


def test_elsewhere_it_is_plain_lines() -> None:
    display, shown = on(terminal=False)
    with display.shown():
        display.begin("records")
        display.progress(1, 4)
        display.progress(2, 4, "half")
        display.end("records", 3.2, "500 [bold] examples")
        display.end("train", 60.0, "100 steps", reused=True)
    assert re.sub(r"0:0\d left", "0:00 left", shown.getvalue()).splitlines() == [
        "  records: 1 of 4  25%, 0:00 left",
        "  records: half  50%, 0:00 left",
        "records: 500 [bold] examples [3.2 s]",
        "train: 100 steps (done before) [60.0 s]",
    ]


def test_lines_come_every_few_seconds_at_most() -> None:
    display, shown = on(terminal=False, seconds_per_line=1000)
    display.begin("train")
    for number in range(1, 100):
        display.on_step(step(number))
    assert shown.getvalue() == ""


def test_time_left_counts_from_where_training_took_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("hrm_text.recipes.display.time.monotonic", lambda: now)
    display, shown = on(terminal=False)
    display.begin("train")
    display.on_start(INFO)
    now = 60.0
    display.on_step(step(60))  # 20 of the 60 that were left, in a minute
    assert "training continues after step 40 of 100" in shown.getvalue()
    assert "60%, 2:00 left" in shown.getvalue()


def test_warnings_stay_and_are_no_markup() -> None:
    display, shown = on(terminal=False)
    display.on_message("warning", "not saved: runs/[a]: full")
    display.on_checkpoint(CheckpointRecord(1, Path("x"), 0.0, 0.1))
    assert shown.getvalue() == "not saved: runs/[a]: full\n"


def test_a_sparkline_spans_low_to_high() -> None:
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert sparkline([4.0] * 3) == "▁▁▁"
    long = sparkline([float(-value) for value in range(1000)], width=10)
    assert len(long) == 10
    assert (long[0], long[-1]) == ("█", "▁")


def test_a_sparkline_leaves_out_what_is_not_finite() -> None:
    assert sparkline([1.0, math.nan, 2.0, math.inf]) == "▁ █ "
    assert sparkline([1.0, math.nan, 2.0, 2.0], width=2) == "▁█"
    assert sparkline([math.nan]) == " "
