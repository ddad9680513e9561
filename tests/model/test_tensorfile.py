from __future__ import annotations

import errno
import hashlib
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hrm_text.contracts import UserError
from hrm_text.model import tensorfile
from hrm_text.model.tensorfile import DTYPE_CODES, load_tensors, opened, read_part, save_tensors


def test_tensors_come_back_and_a_prefix_selects(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"ema/a": torch.arange(6.0).view(2, 3).T, "ema/b": torch.ones(1), "step": torch.tensor(3)})
    assert set(load_tensors(path)) == {"ema/a", "ema/b", "step"}
    assert set(load_tensors(path, prefix="ema/")) == {"ema/a", "ema/b"}
    assert torch.equal(load_tensors(path)["ema/a"], torch.arange(6.0).view(2, 3).T)


def test_the_library_reads_every_dtype_and_shape_to_the_bit(tmp_path: Path) -> None:
    """Odd sizes, no elements, no dimensions, not contiguous."""
    noise = torch.randint(0, 256, (3, 5, 8), dtype=torch.uint8)
    tensors = {f"of {dtype}": noise[:, :, : dtype.itemsize].contiguous().view(dtype)[..., 0] for dtype in DTYPE_CODES}
    tensors["of torch.bool"] = noise[..., 0] > 99
    tensors |= {"none": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "ü": noise.transpose(0, 2), "e": noise[1:, 2]}
    save_tensors(tmp_path / "t", tensors, metadata={"format": "pt"})
    found = safetensors.torch.load_file(tmp_path / "t")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        ours, theirs = tensor.contiguous().reshape(-1), found[name].reshape(-1)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    with safetensors.safe_open(tmp_path / "t", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_it_is_the_file_that_the_library_would_have_written(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(7, 3), "c": torch.randn(5)}  # b, c, a: aligned
    save_tensors(tmp_path / "ours", tensors)
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_all_that_is_written_is_observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "PIECE_BYTES", 13)
    digest = hashlib.sha256()
    save_tensors(tmp_path / "t", {"a": torch.randn(7, 3), "step": torch.tensor(3)}, observe=digest.update)
    assert digest.hexdigest() == hashlib.sha256((tmp_path / "t").read_bytes()).hexdigest()


@pytest.mark.parametrize(("begin", "shape"), [((0, 0), (4, 3)), ((1, 0), (2, 3)), ((3, 1), (1, 2)), ((0, 0), (0, 3))])
def test_a_block_of_a_tensor_is_read(begin: tuple[int, int], shape: tuple[int, int], tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(4, 3)
    save_tensors(tmp_path / "t", {"a": tensor, "s": torch.tensor(5)})
    with opened(tmp_path / "t") as file:
        block = tensor[begin[0] : begin[0] + shape[0], begin[1] : begin[1] + shape[1]]
        assert torch.equal(read_part(file, "a", begin, shape), block)
        assert read_part(file, "s", (), ()) == 5


def test_the_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1)})
    (tmp_path / "other").write_text("")
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_was_read_outlives_its_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t", {"a": torch.ones(50_000)})
    read = load_tensors(tmp_path / "t")
    save_tensors(tmp_path / "t", {"b": read["a"] * 2, "a": read["a"]})
    assert read["a"].sum() == 50_000
    assert load_tensors(tmp_path / "t")["a"].sum() == 50_000


def test_what_the_system_says_is_an_os_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as error:
            save_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(UserError, match=r"t\.safetensors: no such file"):
        load_tensors(path)
    save_tensors(path, {"a": torch.ones(9)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"t\.safetensors: damaged or not a safetensors file"):
        load_tensors(path)
    save_tensors(path, {"a": torch.ones(9)})
    with pytest.raises(UserError, match=r"t\.safetensors: damaged or not a safetensors file"), opened(path) as file:
        read_part(file, "b", (0,), (9,))
