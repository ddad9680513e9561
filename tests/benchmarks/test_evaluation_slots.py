from __future__ import annotations

import pytest

from benchmarks.evaluation_slots import LOADS, load, main, measured, small_model


@pytest.mark.parametrize("name", LOADS)
def test_slots_are_busy_and_prompts_are_computed_once(name: str) -> None:
    found = measured(small_model(), load(name, 80), 8)
    assert found.busy > 0.9
    assert 0 <= found.tail < found.steps / 4
    again = 60 if name == "sampled" else 0  # of a prompt that is there the last token says what follows
    assert found.prefilled == found.forced + again
    assert 0 <= found.padding < 0.25


def test_a_line_for_each_load(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--questions", "8", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in LOADS)
