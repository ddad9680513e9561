"""The fine-tuning benchmark on a model that has learned nothing: every part of it in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fine_tuning
from benchmarks.fine_tuning import WAYS, main, records, spread
from hrm_text.data.procedural import CPU_WEIGHTS, generate
from hrm_text.data.records import write_jsonl
from hrm_text.data.tokenizer import train_tokenizer
from hrm_text.model.config import ModelConfig
from hrm_text.model.recurrence import build
from hrm_text.model.weights import write_weights
from hrm_text.settings import from_mapping

SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "inner_multiple": 8, "L_cycles": 1}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is read of a finished quickstart: weights/ and records/train/."""
    folder = tmp_path_factory.mktemp("quickstart")
    texts = (text for each in generate(CPU_WEIGHTS, 300, 1) for text in (each.instruction, each.response))
    train_tokenizer(texts, 300, folder / "weights")
    config = from_mapping(ModelConfig, SIZES | {"vocab_size": 512, "max_position_embeddings": 256}, "test")
    special = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}
    write_weights(folder / "weights", config, build(config, seed=3).state_dict(), torch.float32, special)
    for task in ("add", "upper"):
        write_jsonl(folder / "records" / "train" / f"{task}.jsonl", generate({task: 1}, 30, 0))
    return folder


def test_replay_is_drawn_from_the_old_records(quickstart: Path, tmp_path: Path) -> None:
    old = {line for task in ("add", "upper")
           for line in (quickstart / "records" / "train" / f"{task}.jsonl").read_text().splitlines()}  # fmt: skip
    [only] = records(quickstart, "strip_vowels", 20, 0, 1, tmp_path / "none")
    new, replayed = records(quickstart, "strip_vowels", 20, 1, 1, tmp_path / "some")
    assert only.read_bytes() == new.read_bytes()
    lines = replayed.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 20 and set(lines) <= old
    assert replayed.read_bytes() != records(quickstart, "strip_vowels", 20, 1, 2, tmp_path / "other")[1].read_bytes()


def test_every_way_is_trained_once_and_told(
    quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine_tuning, "WAYS", (WAYS[0], WAYS[3]))
    few = ["--records", "12", "--epochs", "1", "--questions", "1", "--seeds", "1"]
    command = [str(quickstart), "--out", str(tmp_path / "out"), *few]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "| full | 1 |" in table and "| LoRA, replay 1:1 | 1 |" in table
    results: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["before"]) == {"strip_vowels", *CPU_WEIGHTS}
    assert {name: len(runs) for name, runs in results["runs"].items()} == {"full": 1, "LoRA, replay 1:1": 1}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]
    monkeypatch.setattr(fine_tuning, "fine_tuned", None)  # what is there is not trained again
    assert main(command) == 0
    assert capsys.readouterr().out == table
    assert main([*command[:-1], "1", "--records", "13"]) == 1
    assert "was made with" in capsys.readouterr().err


def test_a_task_of_the_quickstart_is_not_new(
    quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(quickstart), "--out", str(tmp_path), "--task", "add"]) == 1
    assert "'add' is a task of the quickstart" in capsys.readouterr().err


def test_a_spread_is_in_points() -> None:
    assert spread([0.5, 0.75, 1.0]) == "75.0 (50.0 to 100.0)"
    assert spread([-0.01, -0.03], signed=True) == "-2.0 (-3.0 to -1.0)"
