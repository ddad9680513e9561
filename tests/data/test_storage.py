from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.contracts import UserError
from hrm_text.data.storage import (
    BlockCache,
    IntegerFile,
    IntegerWriter,
    location,
    names_in,
    read_header,
    read_integers,
    read_json_at,
    under,
)


def remember(name: str, content: bytes) -> str:
    """A file behind a URL."""
    url = f"memory://storage/{name}"
    with fsspec.open(url, "wb") as file:
        file.write(content)
    return url


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


def test_a_url_stays_text_and_file_urls_are_paths() -> None:
    assert location("s3://bucket/a") == "s3://bucket/a"
    assert location("file:///data/a") == location("/data/a") == location(Path("/data/a")) == Path("/data/a")
    assert under("s3://bucket/a/", "b", "c.npy") == "s3://bucket/a/b/c.npy"
    assert under(Path("a"), "b", "c.npy") == Path("a/b/c.npy")


@given(
    st.lists(st.integers(0, 200), max_size=20),
    st.sampled_from([np.uint8, np.uint16, np.int32, np.uint64]),
    st.integers(1, 7),
)
def test_pieces_written_and_read_are_those_of_numpy(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], dtype: type, size: int
) -> None:
    path = tmp_path_factory.mktemp("integers") / "a.npy"
    array: npt.NDArray[np.integer] = np.array(values, dtype)
    with IntegerWriter(path, dtype, len(array)) as writer:
        for start in range(0, len(array), size):
            writer.write(array[start : start + size].astype(np.int64))
    assert path.read_bytes() == npy(array)
    pieces = list(IntegerFile(path).pieces(size))
    assert all(len(piece) <= size for piece in pieces)
    assert [value for piece in pieces for value in piece.tolist()] == values
    assert read_integers(path).tolist() == read_integers(remember("a.npy", npy(array))).tolist() == values


def test_what_is_no_row_of_integers_is_named_here_and_far_away(tmp_path: Path) -> None:
    for name, content, message in (
        ("floats", npy(np.zeros(3)), "expected a row of integers, found float64"),
        ("square", npy(np.zeros((3, 3), np.int64)), r"shape \(3, 3\)"),
        ("objects", npy(np.array([None, {}])), "expected a row of integers, found object"),
        ("text", b"not an array", "not a readable .npy file"),
        ("nothing", b"", "not a readable .npy file"),
        ("cut", npy(np.zeros(1000, np.int64))[:900], "not a readable .npy file"),
        ("huge", b"\x93NUMPY\x01\x00\xff\xff" + b"x" * 66_000, "not a readable .npy file"),
    ):
        (tmp_path / f"{name}.npy").write_bytes(content)
        for place in (tmp_path / f"{name}.npy", remember(f"{name}.npy", content)):
            with pytest.raises(UserError, match=rf"{name}\.npy: .*{message}"):
                read_header(place)
    for place in (tmp_path / "absent.npy", "memory://storage/absent.npy"):
        with pytest.raises(UserError, match=r"absent\.npy: no such file"):
            read_integers(place)


def test_an_unknown_protocol_is_explained() -> None:
    with pytest.raises(UserError, match=r"nonsense://a/b\.npy: cannot be read"):
        read_integers("nonsense://a/b.npy")


def test_json_and_names_behind_a_url(tmp_path: Path) -> None:
    url = remember("folder/a.json", b'{"a": 1}')
    remember("folder/epoch_0/x.npy", b"")
    assert read_json_at(url) == {"a": 1}
    assert names_in("memory://storage/folder") == ["a.json", "epoch_0"]
    assert names_in("memory://storage/absent") == names_in(tmp_path / "absent") == []
    with pytest.raises(UserError, match="not valid JSON"):
        read_json_at(remember("bad.json", b"{"))
    with pytest.raises(UserError, match="no such file"):
        read_json_at("memory://storage/absent.json")


class TestBlockCache:
    def test_holds_so_many_blocks_and_fetches_no_other_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        url = remember("bytes", bytes(range(100)))
        fetched: list[int] = []
        system = fsspec.filesystem("memory")
        whole = system.cat_ranges

        def counted(paths: list[str], starts: list[int], ends: list[int], **options: Any) -> Any:
            fetched.extend(start // 10 for start in starts)
            return whole(paths, starts, ends, **options)

        monkeypatch.setattr(system, "cat_ranges", counted)
        cache = BlockCache(block_bytes=10, most_blocks=3)
        assert cache.fetch([(url, 1), (url, 9), (url, 1)]) == {
            (url, 1): bytes(range(10, 20)),
            (url, 9): bytes(range(90, 100)),
        }
        cache.fetch([(url, 1), (url, 2), (url, 3)])
        assert fetched == [1, 9, 2, 3]
        cache.fetch([(url, 1)])
        assert fetched == [1, 9, 2, 3]
        cache.fetch([(url, 9)])
        assert fetched == [1, 9, 2, 3, 9]
        # More than it can hold at once is still all there.
        assert len(cache.fetch([(url, number) for number in range(10)])) == 10

    def test_is_shared_by_threads(self) -> None:
        url = remember("bytes", bytes(range(200)))
        cache, wrong = BlockCache(block_bytes=7, most_blocks=2), []

        def read(seed: int) -> None:
            for number in np.random.default_rng(seed).integers(0, 28, 200).tolist():
                if cache.fetch([(url, number)])[url, number] != bytes(range(200))[7 * number : 7 * number + 7]:
                    wrong.append(number)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
