from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hrm_text.contracts import UserError
from hrm_text.model.config import RECURRENCE, ModelConfig, preset
from hrm_text.model.recurrence import build
from hrm_text.model.weights import config_from_json, config_to_json, parse_dtype, read_model, write_weights

IDS = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}


def tiny(**changes: Any) -> ModelConfig:
    return preset("tiny", vocab_size=96, max_position_embeddings=64, **changes)


def written(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = build(config, seed=4)
    write_weights(folder, config, model.state_dict(), dtype, IDS)
    return model.state_dict()


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (values | changes).items() if value is not ...}))


@pytest.mark.parametrize("norm", ["magic", "pre", "post"])
@pytest.mark.parametrize("architecture", list(RECURRENCE))
def test_every_architecture_survives_the_round_trip(architecture: str, norm: str, tmp_path: Path) -> None:
    config = tiny(architecture=architecture, norm=norm)
    tensors = written(tmp_path, config)
    read = read_model(tmp_path)
    same = dict(vars(read.config)) | {"expansion": config.expansion, "inner_multiple": config.inner_multiple}
    assert same == vars(config)  # the inner width may be expressed by other settings
    assert read.config.intermediate_size == config.intermediate_size
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read.state_dict().items())
    assert not read.training
    assert not any(parameter.requires_grad for parameter in read.parameters())
    kind = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert (kind == "hrm_text") == (architecture == "hrm" and norm == "magic")


@pytest.mark.parametrize("k", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("changes", [{}, {"H_cycles": 3, "L_cycles": 2}])
def test_the_gradient_rule_survives_as_transformers_writes_it(changes: dict[str, int], k: int) -> None:
    config = tiny(bp_steps=k + bool(changes), **changes)
    values = config_to_json(config, torch.float32, IDS)
    assert config_from_json(values, Path("config.json")).bp_steps == config.bp_steps


def test_the_released_configuration_is_read() -> None:
    """As published: layers of one stack, their expansion into cache slots, and a list of gradients that is short."""
    values = {
        "model_type": "hrm_text", "vocab_size": 65536, "hidden_size": 1536, "intermediate_size": 4096,
        "num_hidden_layers": 128, "num_layers_per_stack": 16, "num_attention_heads": 12, "head_dim": 128,
        "H_cycles": 2, "L_cycles": 3, "L_bp_cycles": [2], "embedding_scale": 1536**0.5, "initializer_range": 0.0255,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    config = config_from_json(values, Path("config.json"))
    assert config == preset("XL", bp_steps=5)  # both H calls, one L call of the first cycle, two of the second
    del values["num_layers_per_stack"]
    assert config_from_json(values | {"num_hidden_layers": 16}, Path("config.json")) == config


def test_bfloat16_folders_are_half_the_size_and_round(tmp_path: Path) -> None:
    tensors = written(tmp_path, tiny(), torch.bfloat16)
    read = read_model(tmp_path)
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, tensors[name].bfloat16().float())
    assert next(read_model(tmp_path, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_weights_may_be_read_by_those_who_may_read_the_configuration(tmp_path: Path) -> None:
    written(tmp_path, tiny())
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_a_folder_that_transformers_wrote_is_read(shard: str, tmp_path: Path) -> None:
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        max_position_embeddings=64, L_bp_cycles=[1, 2], embedding_scale=3.0, pad_token_id=5,
    )  # fmt: skip
    theirs = HrmTextForCausalLM(config).eval()
    with torch.no_grad():
        theirs.model.z_L_init.normal_()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    ours = read_model(tmp_path)
    assert (ours.config.num_layers, ours.config.bp_steps) == (4, 5)
    assert ours.config.embedding_std == pytest.approx(1 / 3)
    ids = torch.randint(96, (2, 20))
    prefixes = torch.tensor([7, 0])
    with torch.no_grad():
        expected = theirs(ids, token_type_ids=(torch.arange(20) < prefixes[:, None]).long()).logits
    torch.testing.assert_close(ours.logits(ids, prefixes), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_known_exporters_unfused_tensors_are_joined(tmp_path: Path) -> None:
    """A folder whose projections are one tensor each, as Transformers names them in memory."""
    from hrm_text.model.tensorfile import load_tensors, save_tensors

    tensors = written(tmp_path, tiny())
    split = {}
    for name, tensor in load_tensors(tmp_path / "model.safetensors").items():
        if "gqkv_proj" in name:
            for part, rows in zip(("gate", "q", "k", "v"), tensor.chunk(4), strict=True):
                split[name.replace("attn.gqkv", f"self_attn.{part}")] = rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                split[name.replace("gate_up", part)] = rows
        else:
            split[name.replace(".attn.", ".self_attn.")] = tensor
    save_tensors(tmp_path / "model.safetensors", split)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_model(tmp_path).state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'hrm_text'"),
        ({"model_type": ...}, "model_type is None"),
        ({"hidden_size": ...}, "key 'hidden_size' is missing"),
        ({"hidden_size": "wide"}, "a value is not what it should be"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"head_dim": 31}, "head_dim must be even"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"hidden_act": "gelu"}, "hidden_act is set"),
        ({"architecture": "mamba"}, "unknown architecture 'mamba'; known are hrm, trm"),
        (
            {"vocab_size": 95},
            "2 tensors have another shape, such as model.embed_tokens.weight: .96, 64., expected .95, 64.",
        ),
        ({"num_layers_per_stack": 2}, "8 tensors are missing, such as model.H_module.layers.1.attn.gqkv_proj.weight"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_clear_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    written(tmp_path, tiny())
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(UserError, match=message) as error:
        read_model(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder, expected a weights folder"):
        read_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        read_model(tmp_path)
    written(tmp_path, tiny())
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:100], content[:-5], b"\xff" * 100, b""):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors: damaged or not a safetensors file"):
            read_model(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        read_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(UserError, match=r"model-1\.safetensors: no such file"):
        read_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="expected the key weight_map"):
        read_model(tmp_path)


def test_an_unknown_dtype_lists_the_choices() -> None:
    with pytest.raises(UserError, match="unknown dtype 'fp8'; the choices are float32, bfloat16, float16"):
        parse_dtype("fp8")
