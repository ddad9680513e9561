from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hrm_text.contracts import Example, UserError
from hrm_text.data.masks import (
    MASK_MANIFEST,
    excluded_rows,
    finished_manifest,
    folder_identity,
    read_mask,
    refuse_other_content,
    write_masks,
)
from hrm_text.data.records import write_jsonl
from hrm_text.data.tokenize import store_folders, tokenize_files

RNG = np.random.default_rng()


@pytest.fixture
def store(tmp_path: Path, tokenizer_dir: Path) -> Path:
    for name, rows in (("a", 7), ("b", 3)):
        examples = [Example("direct", f"{name} {row}", "x" * (row + 1)) for row in range(rows)]
        write_jsonl(tmp_path / "records" / f"{name}.jsonl", examples)
    tokenize_files([tmp_path / "records"], tokenizer_dir, tmp_path / "store")
    return tmp_path / "store"


def write(out: Path, store: Path) -> dict[str, np.ndarray]:
    """Random masks of all folders."""
    masks = {}
    with write_masks(out) as writer:
        for folder in store_folders(store):
            identity = folder_identity(folder)
            masks[folder.name] = RNG.random(identity["rows"]) < 0.5
            writer.add(folder.name, identity, masks[folder.name])
        writer.finish("test", {"a": 1}, {})
    return masks


def test_what_is_written_is_read(tmp_path: Path, store: Path) -> None:
    masks = write(tmp_path / "masks", store)
    for name, mask in masks.items():
        found = read_mask(tmp_path / "masks", store / name, len(mask))
        assert found.dtype == np.bool_
        assert found.tolist() == mask.tolist()
    manifest = json.loads((tmp_path / "masks" / MASK_MANIFEST).read_text())
    assert {name: noted["masked"] for name, noted in manifest["folders"].items()} == {
        name: mask.sum() for name, mask in masks.items()
    }


def test_a_row_is_excluded_by_any_mask(tmp_path: Path, store: Path) -> None:
    one, two = write(tmp_path / "one", store), write(tmp_path / "two", store)
    both = excluded_rows([tmp_path / "one", tmp_path / "two"], store / "a.jsonl", 7)
    assert both.tolist() == (one["a.jsonl"] | two["a.jsonl"]).tolist()
    assert not excluded_rows([], store / "a.jsonl", 7).any()


def replace_tokens(folder: Path) -> None:
    tokens = np.load(folder / "tokens.npy")
    np.save(folder / "tokens.npy", tokens[::-1].copy())


def permute_rows(folder: Path) -> None:
    for name in ("inst_start", "inst_len", "resp_start", "resp_len"):
        np.save(folder / f"{name}.npy", np.load(folder / f"{name}.npy")[::-1].copy())


def other_source(folder: Path) -> None:
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps(metadata | {"source_sha256": "0"}))


@pytest.mark.parametrize("change", [replace_tokens, permute_rows, other_source])
def test_a_mask_of_another_state_of_the_store_is_refused(tmp_path: Path, store: Path, change: object) -> None:
    write(tmp_path / "masks", store)
    assert callable(change)
    change(store / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl has changed since .*make the mask again"):
        read_mask(tmp_path / "masks", store / "a.jsonl", 7)
    assert len(read_mask(tmp_path / "masks", store / "b.jsonl", 3)) == 3  # its neighbour is as it was


def test_a_source_that_was_only_touched_is_the_same(tmp_path: Path, store: Path) -> None:
    write(tmp_path / "masks", store)
    metadata = json.loads((store / "a.jsonl" / "metadata.json").read_text())
    (store / "a.jsonl" / "metadata.json").write_text(json.dumps(metadata | {"source_mtime": 1, "source_mtime_ns": 1}))
    assert len(read_mask(tmp_path / "masks", store / "a.jsonl", 7)) == 7


def test_what_is_no_mask_of_the_folder(tmp_path: Path, store: Path) -> None:
    with pytest.raises(UserError, match="no folder of masks"):
        read_mask(tmp_path / "masks", store / "a.jsonl", 7)
    write(tmp_path / "masks", store)
    with pytest.raises(UserError, match=r"is of 7 rows of .*, which has 8"):
        read_mask(tmp_path / "masks", store / "a.jsonl", 8)
    shutil.copytree(store / "a.jsonl", store / "c.jsonl")
    with pytest.raises(UserError, match=r"store without c\.jsonl"):
        read_mask(tmp_path / "masks", store / "c.jsonl", 7)
    np.save(tmp_path / "masks" / "a.jsonl.npy", np.zeros(7, np.uint8))
    with pytest.raises(UserError, match="expected 7 booleans, found uint8"):
        read_mask(tmp_path / "masks", store / "a.jsonl", 7)
    (tmp_path / "masks" / "a.jsonl.npy").write_bytes(b"")
    with pytest.raises(UserError, match="not a readable mask"):
        read_mask(tmp_path / "masks", store / "a.jsonl", 7)
    (tmp_path / "masks" / MASK_MANIFEST).write_text('{"folders": {"a.jsonl": 3}}')
    with pytest.raises(UserError, match="expected an object whose folders have an identity"):
        read_mask(tmp_path / "masks", store / "a.jsonl", 7)


def test_only_masks_are_replaced(tmp_path: Path, store: Path) -> None:
    write(tmp_path / "masks", store)
    write(tmp_path / "masks", store)
    with pytest.raises(UserError, match="is no folder of masks, it holds a.jsonl"):
        refuse_other_content(store)
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "a.npy", np.zeros(3))
    with pytest.raises(UserError, match="it holds a.npy"):
        refuse_other_content(tmp_path / "arrays")
    with pytest.raises(UserError, match="is a file"):
        refuse_other_content(tmp_path / "arrays" / "a.npy")


def test_finished_masks_are_those_of_the_same_settings_and_store(tmp_path: Path, store: Path) -> None:
    identities = {folder.name: folder_identity(folder) for folder in store_folders(store)}
    out = tmp_path / "masks"
    assert finished_manifest(out, "test", {"a": 1}, identities) is None
    write(out, store)
    assert finished_manifest(out, "test", {"a": 1}, identities) is not None
    assert finished_manifest(out, "other", {"a": 1}, identities) is None
    assert finished_manifest(out, "test", {"a": 2}, identities) is None
    assert finished_manifest(out, "test", {"a": 1}, {"a.jsonl": identities["a.jsonl"]}) is None
    (out / "b.jsonl.npy").unlink()
    assert finished_manifest(out, "test", {"a": 1}, identities) is None
