from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.contracts import Example, UserError
from hrm_text.data import tokenize
from hrm_text.data.engine import Engine
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.records import find_record_files, write_jsonl, write_parquet
from hrm_text.data.tokenize import ArrayFile, store_folders, tokenize_files
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_info, train_tokenizer

EXAMPLES = [
    Example("synth,cot", "What is 12 + 30?", "42."),
    Example("direct", "", "hello"),
    Example("noisy", "東京は <|im_end|>", "<think>hm</think>Zürich <|box_end|>"),
]
ARRAYS = ("tokens", "inst_start", "inst_len", "resp_start", "resp_len")


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.load(folder / f"{name}.npy") for name in ARRAYS}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    write_jsonl(folder / "a.jsonl", EXAMPLES)
    write_parquet(folder / "flan" / "b.parquet", EXAMPLES[::-1] * 2)
    return folder


def test_processes_give_the_same_bytes(tmp_path: Path, inputs: Path, tokenizer_dir: Path) -> None:
    (inputs / "bad.jsonl").write_text('{"condition": "direct"}\n' + (inputs / "a.jsonl").read_text())
    alone = tokenize_files([inputs], tokenizer_dir, tmp_path / "alone")
    engine = Engine(workers=2, folder=tmp_path / "log")
    together = tokenize_files([inputs], tokenizer_dir, tmp_path / "together", engine=engine)
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    assert together.bad.summary() == alone.bad.summary()
    assert "bad.jsonl:1: missing 'instruction', 'response'" in together.bad.summary()
    assert not (tmp_path / "log").exists()


def test_a_file_that_fails_fails_the_run(tmp_path: Path, inputs: Path, tokenizer_dir: Path) -> None:
    (inputs / "torn.parquet").write_bytes((inputs / "flan" / "b.parquet").read_bytes()[:-9])
    for workers in (1, 2):
        store = tmp_path / f"store{workers}"
        with pytest.raises(UserError, match="torn.parquet: not readable as Parquet"):
            tokenize_files([inputs], tokenizer_dir, store, engine=Engine(workers=workers, folder=tmp_path / "log"))
        assert not (store / tokenize.MANIFEST).exists()


def test_a_folder_that_vanishes_is_named(
    tmp_path: Path, inputs: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_record_files([inputs])
    monkeypatch.setattr(tokenize, "find_record_files", lambda paths: found)
    shutil.rmtree(inputs)
    with pytest.raises(UserError, match=r"a.jsonl: was there a moment ago and is gone"):
        tokenize_files([inputs], tokenizer_dir, tmp_path / "store")


def test_layout_of_the_store(tmp_path: Path, inputs: Path, tokenizer_dir: Path) -> None:
    store = tmp_path / "store"
    summary = tokenize_files([inputs], tokenizer_dir, store)
    prompts = PromptFormat(load_tokenizer(tokenizer_dir), tokenizer_info(tokenizer_dir))
    assert [path.name for path in store_folders(store)] == ["a.jsonl", "flan__b.parquet"]
    assert json.loads((store / "tokenizer_info.json").read_text()) == tokenizer_info(tokenizer_dir)
    for name, examples in (("a.jsonl", EXAMPLES), ("flan__b.parquet", EXAMPLES[::-1] * 2)):
        found = arrays(store / name)
        assert found["tokens"].dtype == np.uint32
        assert {found[span].dtype for span in ARRAYS[1:]} == {np.dtype(np.uint64)}
        stream: list[int] = []
        for row, example in enumerate(examples):
            prefix = prompts.prefix_ids(example.condition, example.instruction)
            response = prompts.response_ids(example.response.removeprefix("<think>hm</think>"))
            assert (found["inst_start"][row], found["inst_len"][row]) == (len(stream), len(prefix))
            assert (found["resp_start"][row], found["resp_len"][row]) == (len(stream) + len(prefix), len(response))
            stream += prefix + response
        assert found["tokens"].tolist() == stream
        assert {len(found[span]) for span in ARRAYS[1:]} == {len(examples)}
    metadata = json.loads((store / "a.jsonl" / "metadata.json").read_text())
    source = (inputs / "a.jsonl").stat()
    assert metadata["source_mtime"] == int(source.st_mtime)
    assert metadata["source_size"] == source.st_size
    assert (summary.files, summary.reused, summary.records, summary.bad.total) == (2, 0, 9, 0)
    assert summary.tokens == sum(len(np.load(folder / "tokens.npy")) for folder in store_folders(store))


def test_pieces_are_laid_end_to_end(
    tmp_path: Path, inputs: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize_files([inputs], tokenizer_dir, tmp_path / "whole")
    monkeypatch.setattr(tokenize, "_CHUNK_RECORDS", 2)
    tokenize_files([inputs], tokenizer_dir, tmp_path / "pieces")
    assert contents(tmp_path / "whole") == contents(tmp_path / "pieces")


def test_a_prompt_that_fills_the_context_is_counted_and_left_out(tmp_path: Path, tokenizer_dir: Path) -> None:
    # The prefix of n digits takes n + 3 tokens: begin, tag, digits, end.
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [Example("direct", "1" * digits, "2") for digits in (6, 7, 8, 3)])
    summary = tokenize_files([path], tokenizer_dir, tmp_path / "store", max_seq_len=10)
    assert dict(summary.bad.counts) == {"too_long": 2}
    assert [bad.line for bad in summary.bad.examples] == [2, 3]
    assert "takes 10 tokens" in summary.bad.examples[0].message
    assert "context of 9" in summary.bad.examples[0].message
    assert np.load(tmp_path / "store/a.jsonl/inst_len.npy").tolist() == [9, 6]
    assert np.load(tmp_path / "store/a.jsonl/inst_start.npy").tolist() == [0, 11]
    assert tokenize_files([path], tokenizer_dir, tmp_path / "any_length").records == 4


def test_strict_stops_at_the_first_bad_record_of_whatever_kind(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [Example("direct", "1", "2"), Example("direct", "1" * 20, "2")])
    path.write_bytes(path.read_bytes() + b"{}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: the prompt takes 23 tokens"):
        tokenize_files([path], tokenizer_dir, tmp_path / "store", strict=True, max_seq_len=10)
    with pytest.raises(UserError, match=r"a\.jsonl:3: missing"):
        tokenize_files([path], tokenizer_dir, tmp_path / "store", strict=True)
    assert not list((tmp_path / "store").iterdir())


def test_bad_records_are_counted_again_when_their_folder_is_reused_and_met_again_when_strict(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, EXAMPLES)
    path.write_bytes(path.read_bytes() + b'{"condition": 1}\n[]\n')
    for reused in (0, 1):
        summary = tokenize_files([path], tokenizer_dir, tmp_path / "store")
        assert (summary.reused, summary.records) == (reused, 3)
        assert dict(summary.bad.counts) == {"missing_key": 1, "wrong_type": 1}
    with pytest.raises(UserError, match=r"a\.jsonl:4"):
        tokenize_files([path], tokenizer_dir, tmp_path / "store", strict=True)


def test_only_what_changed_is_done_again(tmp_path: Path, inputs: Path, tokenizer_dir: Path) -> None:
    store = tmp_path / "store"
    tokenize_files([inputs], tokenizer_dir, store)
    before = contents(store)
    assert tokenize_files([inputs], tokenizer_dir, store).reused == 2
    assert contents(store) == before
    # Of the same content, but written again.
    os.utime(inputs / "a.jsonl", (1, 1))
    assert tokenize_files([inputs], tokenizer_dir, store).reused == 2
    # Of the same size and, to the second, the same time, but of other content.
    source = (inputs / "a.jsonl").stat()
    (inputs / "a.jsonl").write_bytes((inputs / "a.jsonl").read_bytes().replace(b"42", b"43"))
    os.utime(inputs / "a.jsonl", ns=(source.st_atime_ns, source.st_mtime_ns + 1))
    assert tokenize_files([inputs], tokenizer_dir, store).reused == 1
    assert contents(store)["a.jsonl/tokens.npy"] != before["a.jsonl/tokens.npy"]
    assert contents(store)["flan__b.parquet/tokens.npy"] == before["flan__b.parquet/tokens.npy"]
    # Another setting, another tokenizer.
    assert tokenize_files([inputs], tokenizer_dir, store, max_seq_len=500).reused == 0
    other = train_tokenizer(iter(["something else"]), 290, tmp_path / "other")
    assert tokenize_files([inputs], other, store, max_seq_len=500).reused == 0
    assert json.loads((store / "tokenizer_info.json").read_text())["tokenizer_path"] == str(other)


def test_an_interrupted_run_goes_on_from_the_last_finished_file(
    tmp_path: Path, inputs: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize_files([inputs], tokenizer_dir, tmp_path / "whole")
    store = tmp_path / "store"

    def interrupt_after_the_first_file(done: int, total: int) -> None:
        if done > (inputs / "a.jsonl").stat().st_size - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_files([inputs], tokenizer_dir, store, on_progress=interrupt_after_the_first_file)
    assert [path.name for path in store.iterdir()] == ["a.jsonl"]
    # What a killed process leaves beside is not taken for a source.
    (store / ".flan__b.parquet.123.tmp").mkdir()
    assert tokenize_files([inputs], tokenizer_dir, store).reused == 1
    (store / ".flan__b.parquet.123.tmp").rmdir()
    assert contents(store) == contents(tmp_path / "whole")


def test_an_unfinished_store_has_no_manifest(tmp_path: Path, inputs: Path, tokenizer_dir: Path) -> None:
    store = tmp_path / "store"
    tokenize_files([inputs], tokenizer_dir, store)
    other = train_tokenizer(iter(["something else"]), 290, tmp_path / "other")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_files([inputs], other, store, on_progress=interrupt)
    assert not (store / "tokenizer_info.json").exists()


def test_a_folder_whose_source_is_gone_is_an_error_and_is_kept(
    tmp_path: Path, inputs: Path, tokenizer_dir: Path
) -> None:
    store = tmp_path / "store"
    tokenize_files([inputs], tokenizer_dir, store)
    before = contents(store)
    (inputs / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a\.jsonl: not made from any of the inputs"):
        tokenize_files([inputs], tokenizer_dir, store)
    assert contents(store) == before


def test_no_usable_record_at_all_is_an_error(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"not one usable record; 1 bad record skipped: 1 missing_key"):
        tokenize_files([tmp_path / "a.jsonl"], tokenizer_dir, tmp_path / "store")
    assert not (tmp_path / "store" / "tokenizer_info.json").exists()


def test_a_file_without_records_is_a_folder_without_rows(tmp_path: Path, inputs: Path, tokenizer_dir: Path) -> None:
    (inputs / "empty.jsonl").touch()
    assert tokenize_files([inputs], tokenizer_dir, tmp_path / "store").files == 3
    assert all(len(array) == 0 for array in arrays(tmp_path / "store/empty.jsonl").values())


def test_progress_is_in_bytes_of_source(
    tmp_path: Path, inputs: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "_CHUNK_RECORDS", 2)
    total = sum(path.stat().st_size for path in inputs.rglob("*.*"))
    calls: list[tuple[int, int]] = []
    tokenize_files([inputs], tokenizer_dir, tmp_path / "store", on_progress=lambda *call: calls.append(call))
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    assert len(calls) > 2


@given(st.lists(st.lists(st.integers(0, 2**32 - 1))))
def test_an_array_written_in_pieces_is_the_whole_array(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[list[int]]
) -> None:
    path = tmp_path_factory.mktemp("arrays") / "a.npy"
    with ArrayFile(path, np.dtype(np.uint32)) as file:
        for piece in pieces:
            file.append(np.array(piece, np.int64))
    found = np.load(path)
    assert found.dtype == np.uint32
    assert found.tolist() == [value for piece in pieces for value in piece]
