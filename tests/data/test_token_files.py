from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from hrm_text.contracts import UserError
from hrm_text.data import token_files
from hrm_text.data.loader import Loader, LoaderStep
from hrm_text.data.sample import sample_epochs
from hrm_text.data.storage import BlockCache
from hrm_text.data.token_files import open_tokens

NAMES = ("a.jsonl", "b.jsonl", "c.jsonl")


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three files with tokens, one of another type, and one without."""
    rng = np.random.default_rng(0)
    for number, (name, rows) in enumerate((*zip(NAMES, (40, 25, 30), strict=True), ("empty.jsonl", 0))):
        folder = tmp_path / "store" / name
        folder.mkdir(parents=True)
        lengths = rng.integers(1, 20, (rows, 2)).astype(np.uint64)
        ends = np.cumsum(lengths.ravel(), dtype=np.uint64).reshape(rows, 2)
        for column, (start, length) in enumerate((("inst_start", "inst_len"), ("resp_start", "resp_len"))):
            np.save(folder / f"{start}.npy", (ends - lengths)[:, column])
            np.save(folder / f"{length}.npy", lengths[:, column])
        dtype = np.int64 if number == 1 else np.uint32
        np.save(folder / "tokens.npy", rng.integers(0, 1000, int(lengths.sum())).astype(dtype))
    (tmp_path / "store/tokenizer_info.json").write_text('{"vocab_size": 1000}')
    return tmp_path / "store"


@pytest.fixture
def sampled(store: Path) -> Path:
    """The same draws twice, ``plain`` with a copy of the tokens and ``virtual`` without."""
    for name in ("plain", "virtual"):
        sample_epochs(store, store.parent / name, [], 2, virtual=name == "virtual")
    return store.parent / "virtual"


def steps(place: Path | str, **options: Any) -> list[LoaderStep]:
    return [step for step, _ in Loader(place, tokens_per_batch=64, bins=2, **options)]


def assert_equal(found: list[LoaderStep], expected: list[LoaderStep]) -> None:
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert (one.supervised, one.samples, one.tokens) == (other.supervised, other.samples, other.tokens)
        for a, b in zip(one.batches, other.batches, strict=True):
            for name in ("input_ids", "labels", "position_ids", "sample_starts", "prefix_lengths"):
                assert getattr(a, name).tolist() == getattr(b, name).tolist()


def upload(folder: Path, url: str) -> None:
    """Copy a folder behind a URL, in place of what was there."""
    system = fsspec.filesystem("memory")
    for path in system.find(url):
        system.rm(path)
    for file in folder.rglob("*"):
        if file.is_file():
            system.pipe_file(f"{url}/{file.relative_to(folder)}", file.read_bytes())


def test_a_virtual_folder_has_no_tokens_and_the_same_batches(sampled: Path) -> None:
    plain = sampled.parent / "plain"
    assert {path.name for path in plain.iterdir()} - {path.name for path in sampled.iterdir()} == {"tokens.npy"}
    assert {path.name for path in sampled.iterdir()} - {path.name for path in plain.iterdir()} == {"token_files.json"}
    for path in plain.rglob("*_*.npy"):
        assert path.read_bytes() == (sampled / path.relative_to(plain)).read_bytes()
    expected = steps(plain)
    assert_equal(steps(sampled), expected)
    assert_equal(steps(sampled, workers=3), expected)
    assert_equal(steps(f"file://{sampled}"), expected)


def test_folders_behind_a_url_give_the_same_batches(sampled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = steps(sampled.parent / "plain")
    # Blocks so small that spans reach over several, and so few that they come and go.
    monkeypatch.setattr(token_files, "BlockCache", lambda: BlockCache(block_bytes=64, most_blocks=5))
    for name in ("plain", "virtual", "store"):
        upload(sampled.parent / name, f"memory://far/{name}")
    shutil.rmtree(sampled.parent / "store")
    assert_equal(steps("memory://far/plain"), expected)
    assert_equal(steps("memory://far/virtual"), expected)
    assert_equal(steps("memory://far/virtual", workers=3), expected)


def test_a_manifest_may_name_urls_beside_paths(sampled: Path) -> None:
    expected = steps(sampled.parent / "plain")
    upload(sampled.parent / "store", "memory://far/store")
    manifest = json.loads((sampled / "token_files.json").read_text())
    for file in manifest["files"][1:]:
        file["path"] = file["path"].replace("../store", "memory://far/store")
    (sampled / "token_files.json").write_text(json.dumps(manifest))
    shutil.rmtree(sampled.parent / "store/b.jsonl")
    assert_equal(steps(sampled), expected)


def test_both_folders_moved_together_are_found(sampled: Path) -> None:
    expected = steps(sampled.parent / "plain")
    elsewhere = sampled.parent / "elsewhere"
    elsewhere.mkdir()
    for name in ("store", "virtual"):
        shutil.copytree(sampled.parent / name, elsewhere / name, copy_function=shutil.copyfile)  # other times
    shutil.rmtree(sampled.parent / "store")
    assert_equal(steps(elsewhere / "virtual"), expected)


def test_a_store_that_moved_or_changed_is_named(sampled: Path) -> None:
    upload(sampled.parent / "virtual", "memory://far/virtual")
    tokens = sampled.parent / "store/b.jsonl/tokens.npy"
    content = tokens.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=rf"b\.jsonl/tokens\.npy: {message}.*sample the data again"):
            Loader(sampled, tokens_per_batch=64)
        upload(sampled.parent / "store", "memory://far/store")
        with pytest.raises(UserError, match=rf"b\.jsonl/tokens\.npy: {message}.*sample the data again"):
            steps("memory://far/virtual")

    tokens.write_bytes(content[:-8] + bytes([1, 0, 0, 0, 0, 0, 0, 0]))
    os.utime(tokens, (1, 1))
    refused("its content has changed since it was sampled")
    tokens.write_bytes(content + bytes(8))
    refused(r"has [\d,]+ bytes, but had [\d,]+ when it was sampled")
    tokens.unlink()
    refused("no such file, but token_files.json takes tokens from there")
    tokens.write_bytes(content)
    Loader(sampled, tokens_per_batch=64)


def manifest_of(**changes: Any) -> str:
    file = {"path": "x", "first": 0, "length": 1, "dtype": "", "size": 1, "mtime_ns": 0, "fingerprint": ""}
    return json.dumps({"files": [file | changes]})


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", '{"files": []}', '{"files": [3]}', '{"files": [{"path": "x"}]}'),
        *(manifest_of(first=5), manifest_of(length="1"), manifest_of(length=-1), manifest_of(size=None)),
    ],
)
def test_a_damaged_manifest_is_named(sampled: Path, content: str) -> None:
    (sampled / "token_files.json").write_text(content)
    with pytest.raises(UserError, match=r"token_files\.json: expected files that follow one another"):
        open_tokens(sampled)


def test_a_row_from_one_file_into_the_next_is_named(sampled: Path) -> None:
    first = json.loads((sampled / "token_files.json").read_text())["files"][0]["length"]
    starts = np.load(sampled / "epoch_0/inst_start.npy")
    lengths = np.load(sampled / "epoch_0/inst_len.npy")
    starts[3], lengths[3] = first - 1, 2
    np.save(sampled / "epoch_0/inst_start.npy", starts)
    np.save(sampled / "epoch_0/inst_len.npy", lengths)
    with pytest.raises(UserError, match=r"inst_start\.npy: row 3: begins in one file of .*token_files\.json"):
        Loader(sampled, tokens_per_batch=64)
