from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks.loss_curves import PAPER, RUN_COLOURS, differences, draw, main, read_curves, smoothed
from hrm_text.contracts import UserError

ROOT = Path(__file__).parents[2]


def make_run(folder: Path, offset: float = 0.0, every: int = 10, steps: int = 100) -> Path:
    """A run whose losses fall as 5 / step and whose validation loss lies ``offset`` above that."""
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        lines.append({"kind": "step", "step": step, "loss": 5 / step + 1})
        if step % every == 0:
            lines.append({"kind": "validation", "step": step, "loss": 5 / step + 1 + offset})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_difference_is_taken_where_both_were_validated(tmp_path: Path) -> None:
    first = read_curves("first", make_run(tmp_path / "first", every=10))
    other = read_curves("other", make_run(tmp_path / "other", offset=0.25, every=15))
    steps, gaps = differences(other, first)
    assert steps.tolist() == [30, 60, 90]
    np.testing.assert_allclose(gaps, 0.25)
    np.testing.assert_array_equal(differences(first, first)[1], 0)


def test_smoothing_keeps_a_straight_line_and_leaves_out_what_is_not_finite() -> None:
    line = np.arange(50.0)
    np.testing.assert_allclose(smoothed(line, 5)[2:-2], line[2:-2])
    np.testing.assert_allclose(smoothed(np.full(7, 3.0), 20), 3.0)  # shorter than the window, and at the ends
    holed = np.full(9, 2.0)
    holed[4] = np.nan
    np.testing.assert_allclose(smoothed(holed, 3), 2.0)
    assert np.isnan(smoothed(holed, 1)[4])


def test_the_panels_show_the_losses_and_the_differences(tmp_path: Path) -> None:
    runs = [read_curves(name, make_run(tmp_path / name, offset)) for name, offset in (("a", 0.0), ("b", 0.01))]
    losses, gaps = draw(runs, window=5).axes
    drawn = {line.get_label(): line for line in losses.get_lines()}
    np.testing.assert_allclose(np.asarray(drawn["b"].get_ydata()), runs[1].validation_loss)
    assert drawn["a"].get_color() == RUN_COLOURS[0] and drawn["b"].get_color() == RUN_COLOURS[1]
    np.testing.assert_allclose(np.asarray(gaps.get_lines()[-1].get_ydata()), 0.01)
    low, high = gaps.get_ylim()
    assert -0.02 < low < 0 < 0.01 < high < 0.02


def test_the_axis_of_the_differences_fits_the_second_half_and_says_so(tmp_path: Path) -> None:
    first, other = (read_curves(name, make_run(tmp_path / name, offset)) for name, offset in (("a", 0.0), ("b", 0.01)))
    other.validation_loss[1] += 3
    gaps = draw([first, other], window=5).axes[1]
    assert 0.01 < gaps.get_ylim()[1] < 0.02
    assert "larger than the axis" in gaps.get_title(loc="left")
    other.validation_loss[-1] += 3
    gaps = draw([first, other], window=5).axes[1]
    assert gaps.get_ylim()[1] > 3
    assert "larger" not in gaps.get_title(loc="left")


def test_a_picture_is_written_and_the_last_losses_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(tmp_path / name, offset) for name, offset in (("bf16", 0.0), ("fp8", 0.02))]
    out = tmp_path / "docs" / "loss.png"
    assert main([f"bf16={folders[0]}", f"FP8={folders[1]}", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "FP8: validation loss 1.0700 after step 100, +0.0200 at step 100 against bf16" in told
    pixels = imread(out)
    assert pixels.shape[1] > pixels.shape[0] > 1000
    assert pixels[..., :3].std() > 0.01  # something is drawn on the paper


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "no such file"),
        ("{torn", "not the metrics of a run"),
        ('{"kind": "step", "step": 1}', "not the metrics of a run"),
        ('{"kind": "step", "step": 1, "loss": 2.0}', "no record of kind 'validation'"),
    ],
)
def test_a_folder_without_both_losses_is_an_error(tmp_path: Path, lines: str | None, message: str) -> None:
    if lines is not None:
        (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        read_curves("run", tmp_path)


@pytest.mark.parametrize("arguments", [["runs/a"], ["=runs/a"], ["a="], [f"{n}=x" for n in range(9)]])
def test_a_mistaken_command_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "x.png")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_a_loss_that_was_not_finite_is_a_gap(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "validation", "step": 110, "loss": null}\n')
    run = read_curves("run", folder)
    assert np.isnan(run.validation_loss[-1])
    draw([run, run], window=5)


def test_the_colours_are_those_of_the_report() -> None:
    template = "".join(path.read_text() for path in (ROOT / "hrm_text" / "recipes" / "templates").glob("*.j2"))
    assert all(colour in template for colour in (*RUN_COLOURS, PAPER))
