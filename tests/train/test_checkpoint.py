from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hrm_text.contracts import UserError
from hrm_text.train import checkpoint
from hrm_text.train.optimizer import AdamAtan2

CONFIG = {"model": {"name": "tiny", "width": 8}, "learning_rate": 2.2e-4, "note": "naïve"}
STATE = {"loader": {"epoch": 1, "step": 7}, "skipped": 0, "best": None, "ratio": 0.1}


def tensors(value: float = 1.0) -> dict[str, dict[str, Any]]:
    return {
        "weights": {"a.weight": torch.full((3, 2), value, dtype=torch.bfloat16), "b": torch.arange(4.0)},
        "optimizer": {"step": torch.tensor(7), "ema": {"a.weight": torch.full((3, 2), value)}, "master": {}},
    }


def save(root: Path, step: int, **options: Any) -> Path:
    return checkpoint.save(root, step, tensors(float(step)), STATE, CONFIG, **options)


def names(root: Path) -> list[str]:
    """Everything under the root, hidden leftovers too."""
    return sorted(path.name for path in root.iterdir())


def flip_a_bit(path: Path, offset: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path, 1200)
    assert folder == tmp_path / "step_00001200"
    assert names(folder) == [
        "config.yaml",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]
    loaded = checkpoint.load(folder)
    assert (loaded.step, loaded.state, loaded.config) == (1200, STATE, CONFIG)
    assert set(loaded.versions) == {"hrm-text", "python", "torch"}
    weight = loaded.tensors["weights"]["a.weight"]
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, torch.full((3, 2), 1200.0, dtype=torch.bfloat16))
    assert torch.equal(loaded.tensors["optimizer"]["ema"]["a.weight"], torch.full((3, 2), 1200.0))
    assert loaded.tensors["optimizer"]["step"] == 7
    assert names(tmp_path) == ["step_00001200"]


def test_the_files_are_those_of_the_documented_layout(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        assert set(file.keys()) == {"step", "ema/a.weight"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"config.yaml", "optimizer.safetensors", "state.json", "weights.safetensors"}
    assert manifest["files"]["state.json"]["size"] == (folder / "state.json").stat().st_size


def test_all_files_may_be_read_by_those_who_may_read_the_state(tmp_path: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in save(tmp_path, 1).iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    def make(seed: int) -> AdamAtan2:
        torch.manual_seed(seed)
        return AdamAtan2({"w": nn.Parameter(torch.randn(6, 5).T.to(dtype))}.items(), lr=0.1)  # not contiguous

    first, second = make(1), make(2)
    first.parameters["w"].grad = torch.ones_like(first.parameters["w"])
    first.step()
    folder = checkpoint.save(tmp_path, 1, {"weights": first.parameters, "optimizer": first.state_dict()}, STATE, CONFIG)
    loaded = checkpoint.load(folder)
    second.parameters["w"].data.copy_(loaded.tensors["weights"]["w"])
    second.load_state_dict(loaded.tensors["optimizer"])
    for optimizer in (first, second):
        optimizer.parameters["w"].grad = torch.ones_like(optimizer.parameters["w"])
        optimizer.step()
    assert torch.equal(first.parameters["w"], second.parameters["w"])
    assert torch.equal(first.ema_weights()["w"], second.ema_weights()["w"])


@pytest.mark.parametrize("name", ["config.yaml", "optimizer.safetensors", "state.json", "weights.safetensors"])
def test_one_flipped_bit_in_any_file_is_found(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1)
    flip_a_bit(folder / name)
    with pytest.raises(UserError, match=rf"{name}: damaged, found SHA-256 .*, expected .*; use another checkpoint"):
        checkpoint.load(folder)


def test_missing_cut_and_incomplete_files_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    os.truncate(folder / "weights.safetensors", 10)
    with pytest.raises(UserError, match=r"weights\.safetensors: damaged, found 10 bytes, expected \d+"):
        checkpoint.load(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights\.safetensors: missing"):
        checkpoint.load(folder)
    (folder / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(UserError, match=r"manifest\.json: damaged, expected the keys"):
        checkpoint.load(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not valid JSON"):
        checkpoint.load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        checkpoint.load(folder)
    with pytest.raises(UserError, match="no such checkpoint folder"):
        checkpoint.load(tmp_path / "step_00000002")


def test_another_format_names_the_version_that_wrote_it(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99, expected 1; use the version that wrote it"):
        checkpoint.load(folder)


def test_the_newest_good_one_is_found_and_damaged_newer_ones_are_named(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert checkpoint.latest_good(tmp_path, warnings.append) is None
    assert checkpoint.latest_good(tmp_path / "nowhere", warnings.append) is None
    for step in (9, 10, 11, 12):
        save(tmp_path, step, keep_last=9)
    assert checkpoint.latest_good(tmp_path, warnings.append) == tmp_path / "step_00000012"
    assert warnings == []

    flip_a_bit(tmp_path / "step_00000012" / "weights.safetensors")
    (tmp_path / "step_00000011" / "manifest.json").unlink()
    assert checkpoint.latest_good(tmp_path, warnings.append) == tmp_path / "step_00000010"
    assert len(warnings) == 2
    assert "step_00000012/weights.safetensors: damaged" in warnings[0]
    assert "step_00000011: not a complete checkpoint" in warnings[1]
    assert all(warning.endswith("step_00000010") for warning in warnings)

    for step in (9, 10):
        flip_a_bit(tmp_path / f"step_{step:08d}" / "state.json")
    with pytest.raises(UserError, match="none of its 4 checkpoints can be used") as error:
        checkpoint.latest_good(tmp_path, warnings.append)
    assert all(f"step_{step:08d}" in str(error.value) for step in (9, 10, 11, 12))


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step_00000004", "step_00000005"]
    with pytest.raises(ValueError, match="keep_last >= 1"):
        save(tmp_path, 6, keep_last=0)


def test_steps_beyond_eight_digits_still_sort_by_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, keep_last=1)
    assert names(tmp_path) == ["step_100000000"]
    assert checkpoint.latest_good(tmp_path, pytest.fail) == tmp_path / "step_100000000"


def test_damaged_and_later_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=9)
    os.truncate(tmp_path / "step_00000003" / "weights.safetensors", 1)
    save(tmp_path, 4, keep_last=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    save(tmp_path, 2, keep_last=1)  # a run set back to an earlier step leaves the later ones alone
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, tensors(1.0), {"run": "first"}, CONFIG)
    checkpoint.save(tmp_path, 1, tensors(2.0), {"run": "second"}, CONFIG)
    assert checkpoint.load(tmp_path / "step_00000001").state == {"run": "second"}
    assert names(tmp_path) == ["step_00000001"]


def test_nothing_is_pruned_before_the_new_checkpoint_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep_last=1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hrm_text.train.checkpoint.sha256", full)
    with pytest.raises(UserError, match="step_00000002: the disk is full; nothing that existed was changed"):
        save(tmp_path, 2, keep_last=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_00000001"]
    assert checkpoint.load(tmp_path / "step_00000001").step == 1


def test_a_write_that_the_system_refuses_is_explained_and_leaves_the_old_ones(tmp_path: Path) -> None:
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="step_00000002: a file exceeds the largest size allowed"):
            checkpoint.save(tmp_path, 2, {"weights": {"w": torch.ones(100_000)}}, {}, {}, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step_00000001"]
    assert checkpoint.load(tmp_path / "step_00000001").step == 1


def test_a_full_disk_met_by_the_tensor_library_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="step_00000002: the disk is full"):
        save(tmp_path, 2)
    assert names(tmp_path) == []


KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from pathlib import Path
from hrm_text.train import checkpoint
checkpoint.sha256 = lambda path: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(Path(sys.argv[1]), 2, {"weights": {"w": torch.ones(1000)}}, {}, {}, keep_last=1)
"""


def test_a_kill_leaves_a_hidden_folder_which_the_next_save_removes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    left = names(tmp_path)
    assert len(left) == 2
    assert left[0].startswith(".step_00000002.")
    assert left[1] == "step_00000001"
    assert checkpoint.latest_good(tmp_path, pytest.fail) == tmp_path / "step_00000001"
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


def test_a_kill_between_two_renames_loses_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    os.replace(tmp_path / "step_00000001", tmp_path / ".step_00000001.123.old")
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert checkpoint.load(tmp_path / "step_00000001").step == 1


def test_random_states_survive_json() -> None:
    random.seed(5)
    torch.manual_seed(5)
    random.gauss(0, 1)  # leaves a second value waiting, which is part of the state
    saved = json.loads(json.dumps(checkpoint.rng_state()))
    drawn = (random.gauss(0, 1), random.random(), torch.rand(3).tolist())
    random.seed(6)
    torch.manual_seed(6)
    checkpoint.restore_rng(saved)
    assert (random.gauss(0, 1), random.random(), torch.rand(3).tolist()) == drawn
