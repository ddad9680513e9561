from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm_text.contracts import Example, UserError
from hrm_text.data.loader import Loader
from hrm_text.data.procedural import generate
from hrm_text.data.records import write_jsonl, write_parquet
from hrm_text.data.tokenizer import load_tokenizer, train_tokenizer
from hrm_text.recipes.tuning_data import prepared
from hrm_text.settings import from_mapping
from hrm_text.train.config import TrainConfig

MODEL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner_multiple": 16}
Settings = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = (text for each in generate({"upper": 1, "repeat": 1}, 200, 1) for text in (each.instruction, each.response))
    return train_tokenizer(texts, 320, tmp_path_factory.mktemp("tokenizer") / "bpe")


def examples(count: int = 60, seed: int = 0) -> list[Example]:
    return list(generate({"upper": 1, "repeat": 1}, count, seed))


@pytest.fixture
def settings(tmp_path: Path, tokenizer: Path) -> Settings:
    """Settings of a run on records, with changes of the sections data and validation and of seed."""
    write_jsonl(tmp_path / "my.jsonl", examples())

    def make(
        data: dict[str, Any] | None = None, validation: dict[str, Any] | None = None, seed: int = 0
    ) -> TrainConfig:
        of_data = {"records": tmp_path / "my.jsonl", "tokenizer": tokenizer, "tokens_per_batch": 256, "epochs": 2}
        return from_mapping(
            TrainConfig,
            {
                "run": tmp_path / "run",
                "seed": seed,
                "model": MODEL | {"max_position_embeddings": 64},
                "data": of_data | (data or {}),
                "validation": validation or {},
                "optimizer": {"lr": {"peak": 1e-3}},
            },
            "test",
        )

    return make


def texts(sampled: Path, tokenizer: Path, epoch: int = 0) -> list[str]:
    """The samples of an epoch as text, special tokens and all, in their order."""
    loader = Loader(sampled, tokens_per_batch=256)
    reader = load_tokenizer(tokenizer)
    found = []
    for step in range(loader.steps_per_epoch[epoch]):
        [batch] = loader.load(epoch, step).batches
        bounds = batch.sample_starts
        for start, end in itertools.pairwise(bounds):
            ids = [*batch.input_ids[start:end], batch.labels[end - 1]]
            found.append(reader.decode([int(i) for i in ids], skip_special_tokens=False))
    return found


def mentions(text: str, each: Example) -> bool:
    return f"{each.instruction}<|im_end|>{each.response}<|box_end|>" in text


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_records_become_the_epochs_of_the_run(settings: Settings, tokenizer: Path, tmp_path: Path) -> None:
    told: list[str] = []
    ready = prepared(settings(), told.append)
    data = tmp_path / "run" / "data"
    assert (ready.data.sampled, ready.data.records, ready.data.tokenizer) == (data / "sampled" / "train", None, None)
    assert ready.data.epochs == 2 and ready.validation.sampled is None
    for epoch in (0, 1):
        found = texts(data / "sampled" / "train", tokenizer, epoch)
        assert len(found) == 60
        for each in examples():
            assert any(mentions(text, each) for text in found)
    assert texts(data / "sampled" / "train", tokenizer, 0) != texts(data / "sampled" / "train", tokenizer, 1)
    assert told == [told[0]] and "60 records of" in told[0] and "2 epoch(s)" in told[0]
    metadata = json.loads((data / "sampled" / "train" / "metadata.json").read_text())
    assert metadata["max_seq_len"] == 65
    # What the run needs lies in its folder.
    assert metadata["tokenizer_info"]["tokenizer_path"] == str(data / "tokenizer")
    assert (data / "tokenizer" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_a_second_start_finds_all_of_it(settings: Settings, tmp_path: Path) -> None:
    first = prepared(settings(validation={"share": 0.2}))
    before = snapshot(tmp_path / "run" / "data")
    told: list[str] = []
    assert prepared(settings(validation={"share": 0.2}), told.append) == first
    assert snapshot(tmp_path / "run" / "data") == before and told == []
    assert prepared(first) is first  # there are no records left to prepare


def test_what_was_interrupted_is_finished_with_the_same_bytes(settings: Settings, tmp_path: Path) -> None:
    data = tmp_path / "run" / "data"
    whole = {name: content for name, (_, content) in (prepared(settings()), snapshot(data))[1].items()}
    shutil.rmtree(data / "sampled")
    kept = (data / "store" / "my.jsonl" / "tokens.npy").stat().st_mtime_ns
    prepared(settings())
    assert (data / "store" / "my.jsonl" / "tokens.npy").stat().st_mtime_ns == kept
    assert {name: content for name, (_, content) in snapshot(data).items()} == whole


@pytest.mark.parametrize("begun", [False, True])
def test_changed_records_are_noticed(settings: Settings, tokenizer: Path, tmp_path: Path, begun: bool) -> None:
    prepared(settings())
    write_jsonl(tmp_path / "my.jsonl", examples(40, seed=5))
    write_parquet(tmp_path / "more.parquet", examples(5, seed=6))
    changed = settings({"records": [tmp_path / "my.jsonl", tmp_path / "more.parquet"], "epochs": 1}, seed=3)
    if begun:
        (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
        before = snapshot(tmp_path / "run" / "data")
        with pytest.raises(
            UserError,
            match="begun with other records or settings: my.jsonl has changed; more.parquet was not given then; "
            "data.epochs was 2 and is 1; seed was 0 and is 3. Put them back",
        ):
            prepared(changed)
        assert snapshot(tmp_path / "run" / "data") == before
    else:
        sampled = prepared(changed).data.sampled
        assert isinstance(sampled, Path)
        found = texts(sampled, tokenizer)
        assert len(found) == 45
        assert all(any(mentions(text, each) for text in found) for each in examples(40, seed=5))
        assert not (sampled.parent.parent.parent / "data" / "sampled" / "train" / "epoch_1").exists()


def test_bad_records_are_counted_and_named(settings: Settings, tmp_path: Path) -> None:
    with (tmp_path / "my.jsonl").open("a") as file:
        file.write('{"condition": "direct", "instruction": "a"}\n')
        file.write(json.dumps({"condition": "direct", "instruction": "x y " * 60, "response": "b"}) + "\n")
    told: list[str] = []
    prepared(settings(), told.append)
    assert "2 bad records skipped: 1 missing_key, 1 too_long" in told[0]
    assert f"{tmp_path / 'my.jsonl'}:61: missing 'response'" in told[0]
    assert f"{tmp_path / 'my.jsonl'}:62: the prompt takes " in told[0]
    assert "60 records of" in told[0]


def test_the_held_out_share_is_chosen_by_content(settings: Settings, tokenizer: Path, tmp_path: Path) -> None:
    """Whichever way records are ordered and split into files, the same ones are held out, and none is in both."""
    every = examples(200)
    write_jsonl(tmp_path / "my.jsonl", [*every, *every[:50]])  # some twice
    ready = prepared(settings(validation={"share": 0.2, "every_steps": 7}))
    assert ready.validation.every_steps == 7
    assert isinstance(ready.data.sampled, Path) and isinstance(ready.validation.sampled, Path)
    trained, held_out = set(texts(ready.data.sampled, tokenizer)), set(texts(ready.validation.sampled, tokenizer))
    assert not trained & held_out
    assert len(trained | held_out) == len({(e.condition, e.instruction, e.response) for e in every})
    assert 0.1 < len(held_out) / len(trained | held_out) < 0.3

    shutil.rmtree(tmp_path / "run")
    write_jsonl(tmp_path / "a.jsonl", every[:120:-1])
    write_jsonl(tmp_path / "b.jsonl", every[:121])
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    again = prepared(settings({"records": files}, {"share": 0.2}, seed=9))
    assert isinstance(again.validation.sampled, Path)
    assert set(texts(again.validation.sampled, tokenizer)) == held_out

    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"validation.share: 1e-06 of 200 records holds out 0; raise or lower it"):
        prepared(settings({"records": files}, {"share": 1e-6}))


def test_what_cannot_be_prepared_is_an_error(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.tokenizer: .*nowhere/tokenizer.json: no such file"):
        prepared(settings({"tokenizer": tmp_path / "nowhere"}))
    with pytest.raises(UserError, match=r"none.jsonl: no such file or folder"):
        prepared(settings({"records": tmp_path / "none.jsonl"}))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "mine.txt").write_text("")
    with pytest.raises(UserError, match="run/data: is there already and was not made for a run"):
        prepared(settings())


def test_samples_are_those_of_the_seed(settings: Settings, tmp_path: Path) -> None:
    def order(seed: int) -> np.ndarray[Any, Any]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        sampled = prepared(settings(seed=seed)).data.sampled
        assert isinstance(sampled, Path)
        return np.load(sampled / "epoch_0" / "inst_start.npy")

    first = order(0)
    assert np.array_equal(first, order(0)) and not np.array_equal(first, order(1))
