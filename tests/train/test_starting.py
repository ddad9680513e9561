from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hrm_text.contracts import UserError
from hrm_text.data.tokenizer import tokenizer_info, train_tokenizer
from hrm_text.model.config import ModelConfig
from hrm_text.model.origin import Origin, checksum, find_origin
from hrm_text.model.recurrence import build
from hrm_text.model.weights import write_weights
from hrm_text.settings import from_mapping, to_mapping
from hrm_text.train.starting import check_same_tokenizer, train_config

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner_multiple": 16}
SPECIAL = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A weights folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("origin") / "weights"
    shutil.copytree(tokenizer_dir, folder)
    config = from_mapping(ModelConfig, SIZES | {"vocab_size": 512, "max_position_embeddings": 64}, "test")
    write_weights(folder, config, build(config, seed=3).state_dict(), torch.bfloat16, SPECIAL)
    return folder


def values(run: Path, init: Path, **changes: Any) -> dict[str, Any]:
    optimizer = {"lr": {"peak": 1e-3}}
    return {"run": str(run), "init": str(init), "data": {"sampled": "x", "tokens_per_batch": 64},
            "optimizer": optimizer, **changes}  # fmt: skip


def test_the_model_is_that_of_the_weights(weights: Path, tmp_path: Path) -> None:
    model = train_config(values(tmp_path, weights), "test").model
    assert model == find_origin(weights).config
    assert (model.vocab_size, model.max_position_embeddings, model.hidden_size) == (512, 64, 32)
    # What is given and agrees is no error, whichever type a command line makes of it; K may be another one.
    given = {"hidden_size": "32", "num_heads": 2, "vocab_size": 0, "bp_steps": "3"}
    changed = train_config(values(tmp_path, weights, model=given), "test").model
    assert to_mapping(changed) == to_mapping(model) | {"bp_steps": 3}
    # A weights folder knows the inner width and not the rule that led to it: settings that lead to it agree.
    assert model.inner_multiple == 1 != SIZES["inner_multiple"]
    assert train_config(values(tmp_path, weights, model=dict(SIZES)), "test").model == model


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"hidden_size": 64, "norm": "post"},
            "hidden_size is 32 there and 64 here; norm is 'magic' there and",
        ),
        ({"architecture": "looped"}, "architecture is 'hrm' there and 'looped' here"),
        ({"inner_multiple": 64}, "intermediate_size is 96 there and 128 here"),
        ({"init": "normal"}, "embedding_std is 0.17.* there and 0.02 here"),
        ({"vocab_size": 1024}, "vocab_size is 512 there and 1024 here"),
        ({"hiden_size": 64}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
    ],
)
def test_another_model_is_an_error_that_names_every_difference(
    weights: Path, tmp_path: Path, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        train_config(values(tmp_path, weights, model=given), "test")


def test_without_init_a_model_must_be_given(tmp_path: Path) -> None:
    without = values(tmp_path, tmp_path) | {"init": None}
    with pytest.raises(UserError, match="test: missing key 'model'"):
        train_config(without, "test")
    with pytest.raises(UserError, match="test: expected keys and values, found list"):
        train_config([], "test")


def test_what_is_no_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: is not there; expected a weights folder"):
        train_config(values(tmp_path, tmp_path / "nowhere"), "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no weights; expected a weights folder"):
        find_origin(tmp_path / "empty")


def test_a_run_that_has_begun_needs_its_origin_no_more(weights: Path, tmp_path: Path) -> None:
    model = train_config(values(tmp_path, weights), "test").model
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": to_mapping(model)}))
    again = train_config(values(tmp_path, tmp_path / "gone"), "test")
    assert again.model == model and again.init == tmp_path / "gone"
    with pytest.raises(UserError, match=rf"{tmp_path / 'config.yaml'} holds another model: num_heads is 2 there and 4"):
        train_config(values(tmp_path, tmp_path / "gone", model={"num_heads": 4}), "test")


def test_weights_are_read_in_fp32_and_have_one_checksum(weights: Path) -> None:
    tensors = find_origin(weights).weights()
    config = find_origin(weights).config
    stored = {name: tensor.bfloat16().float() for name, tensor in build(config, seed=3).state_dict().items()}
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)
    digest = checksum(tensors)
    assert digest == checksum({name: tensor.bfloat16() for name, tensor in reversed(tensors.items())})
    name = "model.H_module.layers.0.attn.o_proj.weight"
    assert digest != checksum(tensors | {name: tensors[name].clone().index_fill_(0, torch.tensor(3), 0.5)})
    assert digest != checksum(tensors | {name: tensors[name].view(16, -1)})


def test_tokenizers_are_compared_by_content(weights: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    origin = find_origin(weights)
    elsewhere = shutil.copytree(tokenizer_dir, tmp_path / "elsewhere")
    file = elsewhere / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
    assert file.read_bytes() != (tokenizer_dir / "tokenizer.json").read_bytes()
    assert check_same_tokenizer(origin, tokenizer_info(elsewhere), "SAMPLED") is None

    other = train_tokenizer(iter(["some other words", "of another text"]), 300, tmp_path / "other")
    with pytest.raises(UserError, match=r"SAMPLED was made with the tokenizer .*other.*vocab_size is 300, there 320"):
        check_same_tokenizer(origin, tokenizer_info(other), "SAMPLED")

    gone = tokenizer_info(elsewhere) | {"tokenizer_path": str(tmp_path / "gone")}
    told = check_same_tokenizer(origin, gone, "SAMPLED")
    assert told is not None and "gone/tokenizer.json is not there: whether SAMPLED" in told
    with pytest.raises(UserError, match="ids up to 1,000, and .* an embedding of 512"):
        check_same_tokenizer(origin, gone | {"vocab_size": 1000}, "SAMPLED")
    moved = Origin(origin.folder, origin.config, tmp_path / "gone", origin.is_checkpoint)
    assert "gone/tokenizer.json is not there" in str(check_same_tokenizer(moved, tokenizer_info(elsewhere), "SAMPLED"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora": {"rank": 4}, "init": None, "model": SIZES}, "lora trains adapters upon given weights: name them"),
        (
            {"lora": {"rank": 4}, "distributed": {"sharding": "fsdp"}},
            "lora goes with distributed.sharding ddp, found 'fsdp'",
        ),
        ({"data": {"tokens_per_batch": 64}}, "data: expected sampled .* or records .*, found neither"),
        ({"data": {"tokens_per_batch": 64, "sampled": "x", "records": "y"}}, "data: expected sampled .*found both"),
        ({"data": {"tokens_per_batch": 64, "sampled": "x", "tokenizer": "y"}}, "tokenizer is for records"),
        ({"data": {"tokens_per_batch": 64, "records": "y"}, "init": None, "model": SIZES}, "need a tokenizer: name"),
        ({"lora": {"alpha": 2.0}}, "lora: rank is 0, so there are no adapters for the other settings"),
        ({"validation": {"share": 0.1}}, "validation.share is a share of data.records, and there are none"),
    ],
)
def test_settings_that_do_not_go_together(weights: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        train_config(values(tmp_path, weights) | changes, "test")


def test_one_path_of_records_is_a_list_of_one(weights: Path, tmp_path: Path) -> None:
    def records(given: Any) -> Any:
        data = {"tokens_per_batch": 64, "records": given}
        return train_config(values(tmp_path, weights, data=data), "test").data.records

    assert records("a.jsonl") == (Path("a.jsonl"),)
    assert records(["a.jsonl", "b"]) == (Path("a.jsonl"), Path("b"))
