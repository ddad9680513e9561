from __future__ import annotations

from pathlib import Path

import pytest

from hrm_text.contracts import Example, UserError
from hrm_text.data.inspect import inspect_folder
from hrm_text.data.records import write_jsonl
from hrm_text.data.sample import sample_epochs
from hrm_text.data.tokenize import tokenize_files

PREFIX = "<|im_start|><|quad_end|><|object_ref_end|>What is {}?<|im_end|>"


@pytest.fixture
def store(tmp_path: Path, tokenizer_dir: Path) -> Path:
    for name, count in (("a", 3), ("b", 1)):
        examples = [Example("synth,cot", f"What is {name} {row}?", f"{row}") for row in range(count)]
        write_jsonl(tmp_path / "records" / f"{name}.jsonl", examples)
    tokenize_files([tmp_path / "records"], tokenizer_dir, tmp_path / "store")
    return tmp_path / "store"


def test_a_store_shows_samples_of_every_file_with_special_tokens(store: Path) -> None:
    shown = inspect_folder(store, 3)
    assert [(text.source, text.row) for text in shown] == [("a.jsonl", 0), ("a.jsonl", 1), ("b.jsonl", 0)]
    assert shown[1].prefix == PREFIX.format("a 1")
    assert shown[1].response == "1<|box_end|>"
    assert shown[1].response_tokens == 2
    assert PREFIX.format("a 1") in str(shown[1])
    assert len(inspect_folder(store, 100)) == 4


def test_a_sampled_folder_shows_its_first_epoch_in_order(store: Path, tmp_path: Path) -> None:
    sample_epochs(store, tmp_path / "sampled", [], 2)
    shown = inspect_folder(tmp_path / "sampled", 4)
    assert {text.source for text in shown} == {"epoch_0"}
    assert [text.row for text in shown] == [0, 1, 2, 3]
    expected = {(PREFIX.format(f"a {row}"), f"{row}<|box_end|>") for row in range(3)}
    assert {(text.prefix, text.response) for text in shown} == expected | {(PREFIX.format("b 0"), "0<|box_end|>")}


def test_other_folders_and_lost_tokenizers_say_so(store: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match="expected a token store"):
        inspect_folder(tmp_path, 1)
    info = (store / "tokenizer_info.json").read_text()
    (store / "tokenizer_info.json").write_text(info.replace(str(tokenizer_dir.resolve()), "/moved/away"))
    with pytest.raises(UserError, match="made with the tokenizer /moved/away"):
        inspect_folder(store, 1)
    assert inspect_folder(store, 1, tokenizer_dir)[0].prefix == PREFIX.format("a 0")
