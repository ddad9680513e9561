"""What the scaling table measures, in which order, and what it makes of that; and one launch of real ranks."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import main
from benchmarks.scaling_cost import basis_of, budget_hours, costs, measurement_rows
from benchmarks.scaling_launch import ROOT, Measuring, has_checkpoint, last_words, run_folder
from benchmarks.scaling_plan import (
    RECIPES,
    Cell,
    Cells,
    Launch,
    Line,
    affordable,
    all_cells,
    group_seconds,
    impossible,
    launches,
    left_to_do,
)
from benchmarks.scaling_report import BEGIN, END, into_docs
from hrm_text.recipes.budget_measurements import predict
from hrm_text.settings import read_yaml

H200 = {"device": "cuda: NVIDIA H200"}
VERSIONS = {"torch": "2.11.0"}
MADE: dict[str, Any] = {
    "machine": H200, "versions": VERSIONS, "gpus": 2, "commit": "abc", "date": "2026-11-23T01:02:03",
}  # fmt: skip


def timing(ms: float, tokens: int = 12_288, **changes: Any) -> dict[str, Any]:
    figures = {"budget_per_second": 1e3 * tokens / ms, "step_ms": ms, "mfu": 0.4, "peak_bytes": 40 * 2**30,
               "ms_by_part": None, "hidden_communication_ms": None}  # fmt: skip
    return figures | changes


def write(work: Path, cell: Cell, figures: dict[str, Any], status: Any = "done") -> None:
    work.mkdir(exist_ok=True)
    Cells(work).add(Line(cell, status, figures, MADE))


def test_the_most_worth_comes_first_and_every_kind_is_there() -> None:
    cells = all_cells(["XL", "L"], [1, 2, 4, 8], there=8)
    assert len(set(cells)) == len(cells)
    first = [cell for cell in cells if cell.kind == "step"][:4]
    assert [(cell.size, cell.precision, cell.gpus, cell.sharding) for cell in first] == [
        ("XL", "bf16", 8, "fsdp"), ("XL", "bf16", 1, "none"), ("XL", "bf16", 4, "fsdp"), ("XL", "bf16", 2, "fsdp"),
    ]  # fmt: skip
    by_shape = [(cell.sharding, cell.size) for cell in cells if cell.kind == "step" and cell.gpus > 1]
    assert list(dict.fromkeys(by_shape)) == [(way, size) for way in ("fsdp", "ddp", "hsdp") for size in ("XL", "L")]
    assert {cell.gpus for cell in cells if cell.sharding == "hsdp"} == {4, 8}, "at 2 it is ddp"
    batches = {(cell.size, cell.gpus): cell.passes for cell in cells if cell.kind == "batch"}
    assert batches == {("XL", 2): 8, ("XL", 4): 4, ("XL", 8): 2, ("L", 2): 4, ("L", 4): 2}
    assert [cell.ranks for cell in cells if cell.kind == "resume"] == [4]
    order = [cell.kind for cell in cells]
    assert order.index("batch") < order.index("checkpoint") < order.index("resume")
    of_two = [cell.gpus for cell in all_cells(["XL"], [1, 2, 4, 8], there=2) if cell.kind == "resume"]
    assert of_two == [2, 8], "what the machine can do, and what it cannot"


@pytest.mark.parametrize("size", [size for size, recipe in RECIPES.items() if recipe.published])
def test_published_batches_are_those_of_the_configurations(size: str) -> None:
    path = ROOT / "configs" / f"{size}.yaml"
    data = read_yaml(path)["data"]
    assert (RECIPES[size].tokens, RECIPES[size].micro_batches) == (data["tokens_per_batch"], data["micro_batches"])


def test_what_the_machine_cannot_measure_has_a_reason() -> None:
    cell = Cell("step", "XL", 8, "FP8")
    assert impossible(cell, 2, float8=True) == "needs 8 GPUs"
    assert impossible(cell, 8, float8=False) == "FP8 needs a GPU of compute capability 8.9"
    assert impossible(cell, 8, float8=True) is None


def test_cells_share_a_process_and_take_turns() -> None:
    cells = [cell for cell in all_cells(["XL", "L"], [1, 2], there=2) if cell.kind in ("step", "resume")]
    two, one, resumed = launches(cells)
    assert (two.ranks, one.ranks, resumed.ranks) == (2, 1, 1)
    assert [[cell.sharding for cell in group] for group in two.groups] == [["fsdp", "ddp"]] * 4
    assert [cell.kind for cell in resumed.groups[0]] == ["resume"], "a training run has a process to itself"
    alone = launches(cells, alone=frozenset(two.groups[0]))[0]
    assert [len(group) for group in alone.groups] == [1, 2, 2, 2, 1]
    # With the GPUs side by side, which are trained once for both.
    assert group_seconds(two.groups[0]) < 2 * group_seconds(two.groups[0][:1])


def test_the_time_is_filled_in_the_order_of_worth() -> None:
    cells = all_cells(["XL", "L"], [1, 2], there=2)
    some = affordable(cells, 120)
    assert some[0] == cells[0] and sum(launch.seconds for launch in launches(some)) <= 120
    assert affordable(cells, 5) == [] and affordable(cells, 1e6) == cells
    dear = [Cell("step", "XL", 2), Cell("resume", "XL", 2), Cell("exchange", "XL", 2)]
    assert affordable(dear, launches(dear[:1])[0].seconds + 5) == dear[:1], "time is kept for what is worth more"
    runs = [Cell("checkpoint", "XL", 2), Cell("resume", "XL", 2)]
    assert affordable(runs, launches(runs[:1])[0].seconds - 1) == [], "nothing to resume from"


def test_the_file_keeps_whole_lines_and_the_last_of_a_cell(tmp_path: Path) -> None:
    cells, cell = Cells(tmp_path), Cell("step", "XL", 2)
    write(tmp_path, cell, {"error": "out of memory"}, "failed")
    with cells.path.open("a") as file:
        file.write('{"cell": {"kind": "st')  # a process that was killed
    assert cells.read()[cell].status == "failed"
    write(tmp_path, cell, timing(460))
    write(tmp_path, replace(cell, gpus=1), timing(440))
    assert len(cells.path.read_bytes().splitlines()) == 3
    assert cells.read()[cell].figures["step_ms"] == 460


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    cells = [Cell("step", "XL", 2), Cell("step", "XL", 2, "FP8"), Cell("checkpoint", "XL", 2), Cell("resume", "XL", 2)]
    write(tmp_path, cells[0], timing(460))
    write(tmp_path, cells[1], {"error": ""}, "failed")
    write(tmp_path, cells[2], {})
    lines = Cells(tmp_path).read()
    assert left_to_do(cells, lines, lambda _: True) == cells[3:]
    assert left_to_do(cells, lines, lambda _: True, retry=True) == [cells[1], cells[3]]
    assert left_to_do(cells, lines, lambda _: False) == cells[2:], "the checkpoint is gone, and made once more"
    folder = run_folder(tmp_path, cells[3]) / "checkpoints" / "step_00000006"
    folder.mkdir(parents=True)
    assert not has_checkpoint(tmp_path, cells[3])
    (folder / "state.json").touch()
    assert has_checkpoint(tmp_path, cells[3])


def test_cells_that_fail_together_are_tried_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, ...]] = []
    said: list[str] = []

    def launch(self: Measuring, launch: Launch) -> dict[Cell, Line]:
        group = launch.groups[0]
        tried.append(tuple(cell.sharding for cell in group))
        if any(cell.sharding == "ddp" for cell in group):
            return self._failed(group, "out of memory")
        return {cell: self._add(cell, "done", {}) for cell in group}

    monkeypatch.setattr(Measuring, "launch", launch)
    cells = [Cell("step", "XL", 2), Cell("step", "XL", 2, sharding="ddp")]
    Measuring(tmp_path, "cpu", time.time() + 1e4, dict(MADE), said.append).all(cells, retry=False)
    assert tried == [("fsdp", "ddp"), ("fsdp",), ("ddp",)]
    assert [line.status for line in Cells(tmp_path).read().values()] == ["done", "failed"]


def test_what_a_rank_said_is_not_hidden_by_its_launcher() -> None:
    launcher = "E1123 00:47:07 99 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1)"
    log = "\n".join(["Traceback", *["  a line"] * 50, "OutOfMemoryError: 3 GiB", launcher, *["====="] * 40])
    assert last_words(log, 1).splitlines()[-1] == "OutOfMemoryError: 3 GiB"
    assert len(last_words(log, 1).splitlines()) == 30
    assert last_words("", -9) == "exit code -9, and no word"


def test_the_end_of_the_time_is_no_failure(tmp_path: Path) -> None:
    [launch] = launches([Cell("step", "tiny", 1, sharding="none")])
    began = time.time()
    assert Measuring(tmp_path, "cpu", began + 1, dict(MADE), print).launch(launch) == {}
    assert time.time() < began + 20 and Cells(tmp_path).read() == {}


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    parts = {"communication, exposed": 3.1}
    write(work, Cell("step", "XL", 1, sharding="none"), timing(440))
    write(work, Cell("step", "XL", 2), timing(460, beside=timing(450), ms_by_part=parts, hidden_communication_ms=33.0))
    write(work, Cell("step", "XL", 2, sharding="ddp"), timing(480, beside=timing(450)))
    write(work, Cell("batch", "XL", 2), timing(3500, 8 * 12_288))
    exchange = {"name": "reduce-scatter", "unit": "block", "elements": 33_030_144, "bytes": 4, "ms": 0.295}
    write(work, Cell("exchange", "XL", 2), {"exchanges": [exchange]})
    saves = [{"step": 6, "stalled": 4.9, "whole_after": 20.0}, {"step": 12, "stalled": 0.2, "whole_after": 16.0}]
    write(work, Cell("checkpoint", "XL", 2), {"saves": saves, "losses": {"6": 10.0, "7": 8.0, "8": 6.0}})
    write(work, Cell("resume", "XL", 2), {"losses": {"7": 8.0, "8": 6.006}})
    write(work, Cell("step", "XL", 2, "FP8"), {"error": "Traceback\nRuntimeError: no"}, "failed")
    return work


def test_the_report_says_what_was_measured_and_what_was_not(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(measured), "--report"]) == 0
    text = capsys.readouterr().out
    assert "2 x NVIDIA H200; PyTorch 2.11.0; commit abc; 2026-11-23" in text
    assert "| XL | bf16 | 1 | - | 27,927 | | | 100.0% | 40.0% | 40.0 | | | 440.0 |" in text
    assert "| XL | bf16 | 2 | fsdp | 26,713 | 27,307 | 97.8% | 95.7% | 40.0% | 40.0 | 3.1 | 33.0 | 460.0 |" in text
    assert "| XL | bf16 | 196,608 | 2 | 8 | 3,500 | 56,174 | 100.6% | 40.0% | 40.0 |" in text
    assert "| XL | 2 | 4.90 | 0.20 | 20.0 | 16.0 |" in text
    assert "resumed on 1. Losses of the resumed steps differ by 1.0e-03 at most" in text
    assert "| resumed on 1 | | 8.0000 | 6.0060 |" in text
    assert "* failed: RuntimeError: no: step XL 2 FP8 fsdp" in text
    assert "* not run: needs 8 GPUs: 17 cells\n" in text
    assert (measured / "scaling.png").stat().st_size > 10_000
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    (docs / "performance.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    into_docs(measured, docs)
    page = (docs / "performance.md").read_text()
    assert page.startswith(f"before\n{BEGIN}\n\n2 x NVIDIA H200") and page.endswith(f"\n{END}\nafter\n")
    assert "old" not in page and (docs / "images" / "scaling.png").exists()


def test_a_run_costs_what_the_budget_says_times_what_was_measured(measured: Path) -> None:
    done = {cell: line for cell, line in Cells(measured).read().items() if line.status == "done"}
    basis = basis_of(done, "XL", "bf16", 16)
    assert basis is not None and basis.cell == Cell("step", "XL", 2)
    of_two = basis_of(done, "XL", "bf16", 2)
    assert of_two is not None and of_two.cell.kind == "batch", "it is the run's own"
    assert basis_of(done, "L", "bf16", 8) is None
    eight, sixteen = costs(done, price=3.0)
    assert (eight.gpus, sixteen.gpus, sixteen.published_hours, eight.published_hours) == (8, 16, 46, None)
    assert sixteen.hours == pytest.approx(budget_hours("XL", 16, "bf16", "h200") * basis.factor)
    assert sixteen.dollars == pytest.approx(3 * 16 * sixteen.hours)


def test_rows_for_the_budget_can_be_pasted(measured: Path) -> None:
    from hrm_text.recipes import budget_measurements

    done = {cell: line for cell, line in Cells(measured).read().items() if line.status == "done"}
    rows = eval("[" + "\n".join(measurement_rows(done)) + "]", vars(budget_measurements).copy())
    assert [getattr(row, "sharding", None) for row in rows] == ["none", "fsdp", "ddp", "fsdp", None]
    assert [row.ms for row in rows] == [440.0, 460.0, 480.0, 3500.0, 0.295]
    assert rows[3].passes == 8 and predict(rows[3]).ms == pytest.approx(3500, rel=0.05)
    assert rows[4].predicted_ms == pytest.approx(0.29, rel=0.01)


def test_nothing_measured_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--report"]) == 1
    assert "no cell has been measured" in capsys.readouterr().err


def test_two_real_ranks_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), "--device", "cpu", "--sizes", "tiny", "--gpus", "2", "--kinds", "step,exchange"]
    assert main(arguments) == 0
    lines = [json.loads(text) for text in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [(line["cell"]["kind"], line["cell"]["sharding"]) for line in lines] == [
        ("step", "fsdp"), ("step", "ddp"), ("exchange", "fsdp"),
    ]  # fmt: skip
    assert lines[0]["figures"]["ranks"] == 2 and lines[0]["figures"]["beside"]["sharding"] is None
    assert {one["name"] for one in lines[2]["figures"]["exchanges"]} == {"reduce-scatter", "all-gather", "all-to-all"}
    told = capsys.readouterr().err
    assert "3 cells measured, 0 failed" in told and "FP8 needs a GPU" in told
    assert main(arguments) == 0
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 3, "nothing is measured twice"
