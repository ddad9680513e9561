from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from hrm_text.contracts import Example, UserError
from hrm_text.data.procedural import is_held_out
from hrm_text.data.sources import SOURCES, FileReport, build_gpu_mixture
from hrm_text.data.sources.mixture import divide
from hrm_text.data.sources.registry import Keyed

SCALE = 2e-4


def keyed(number: int, wording: str = "{}?") -> Keyed:
    return Keyed("toy", str(number), Example("direct", wording.format(number), "yes"), "yes")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_training_and_held_out_examples_lie_on_their_sides_of_the_split() -> None:
    train, kept_out = divide((keyed(i) for i in itertools.count()), wanted=500, held_out=30)
    assert len(train) == 500
    assert len(kept_out) == 30
    assert not any(is_held_out("toy", example.key) for example in train)
    assert all(is_held_out("toy", example.key) for example in kept_out)


def test_held_out_problems_are_different_ones_and_training_never_repeats_an_instruction() -> None:
    wordings = ("{}?", "Is it {}?", "{}?")
    examples = (keyed(i % 300, wordings[i % 3]) for i in range(3000))
    train, kept_out = divide(examples, wanted=10_000, held_out=1000)
    assert len({example.example.instruction for example in train}) == len(train)
    assert len({example.key for example in kept_out}) == len(kept_out) < 60


def test_a_source_that_repeats_itself_ends() -> None:
    train, kept_out = divide((keyed(i % 50) for i in itertools.count()), wanted=1000, held_out=1000)
    assert len(train) + len(kept_out) == 50


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[FileReport]]:
    out = tmp_path_factory.mktemp("mixture")
    return out, build_gpu_mixture(out, 1, scale=SCALE, sources=["procedural"])


def test_every_file_is_there_with_what_its_report_says(built: tuple[Path, list[FileReport]]) -> None:
    out, reports = built
    assert [report.file for report in reports] == list(SOURCES["procedural"].files)
    for report in reports:
        records = read(out / "train" / report.source / f"{report.file}.jsonl")
        assert (
            len(records) == report.examples == report.wanted == round(SCALE * SOURCES["procedural"].files[report.file])
        )
        assert sum(len(record["instruction"] + record["response"]) for record in records) == report.characters
        held_out = read(out / "held_out" / report.source / f"{report.file}.jsonl")
        assert len(held_out) == report.held_out
        assert all(record.keys() == {"condition", "instruction", "response", "task", "answer"} for record in held_out)
        assert {record["instruction"] for record in held_out}.isdisjoint(record["instruction"] for record in records)


def test_finished_files_are_kept_and_the_others_made_the_same_by_any_number_of_workers(
    built: tuple[Path, list[FileReport]],
) -> None:
    out, reports = built
    lost, kept = out / "train/procedural/choice.jsonl", out / "train/procedural/reading.jsonl"
    before, untouched = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (out / "reports/procedural/choice.json").unlink()
    again = build_gpu_mixture(out, 1, scale=SCALE, workers=1, sources=["procedural"])
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == untouched
    assert [report.characters for report in again] == [report.characters for report in reports]


def test_an_unknown_source_or_scale_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown source 'gsm'"):
        build_gpu_mixture(tmp_path / "out", sources=["procedural", "gsm"])
    with pytest.raises(UserError, match="expected a scale above 0"):
        build_gpu_mixture(tmp_path / "out", scale=0)
    assert not (tmp_path / "out").exists()
