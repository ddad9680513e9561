from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from hrm_text.contracts import UserError
from hrm_text.model.tensorfile import load_tensors, save_tensors


def test_tensors_come_back_and_a_prefix_selects(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"ema/a": torch.arange(6.0).view(2, 3).T, "ema/b": torch.ones(1), "step": torch.tensor(3)})
    assert set(load_tensors(path)) == {"ema/a", "ema/b", "step"}
    assert set(load_tensors(path, prefix="ema/")) == {"ema/a", "ema/b"}
    assert torch.equal(load_tensors(path)["ema/a"], torch.arange(6.0).view(2, 3).T)


def test_the_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1)})
    (tmp_path / "other").write_text("")
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_the_system_said_comes_back_as_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError) as error:
        save_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1)})
    assert error.value.errno == errno.ENOSPC


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t\.safetensors: no such file"):
        load_tensors(tmp_path / "t.safetensors")
