"""The weights folder: config.json and model.safetensors, one format for all that reads weights (spec, section 5).

An HRM with MagicNorm is written as Transformers' ``hrm_text``, so that it loads there without remote code. Any other
member of the family has a model_type of its own, so that nothing mistakes it for what it is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.files import read_json
from hrm_text.model.config import RECURRENCE, ModelConfig
from hrm_text.model.plan import plan
from hrm_text.model.recurrence import RecurrentLM
from hrm_text.model.tensorfile import load_tensors, save_tensors
from hrm_text.settings import from_mapping

MODEL_TYPE = "hrm_text"
FAMILY_MODEL_TYPE = "hrm_text_family"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name; an unknown one is an error that lists the choices."""
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; the choices are {', '.join(DTYPES)}")
    return DTYPES[name]


def is_transformers_model(config: ModelConfig) -> bool:
    """Whether Transformers' ``hrm_text`` is this model: HRM with MagicNorm (and a width its configuration accepts)."""
    return config.architecture == "hrm" and config.norm == "magic" and config.hidden_size % config.num_heads == 0


def config_to_json(config: ModelConfig, dtype: torch.dtype, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """The content of config.json. ``special_ids`` has bos_token_id, eos_token_id and pad_token_id."""
    is_hrm = is_transformers_model(config)
    values: dict[str, Any] = {
        "model_type": MODEL_TYPE if is_hrm else FAMILY_MODEL_TYPE,
        "architectures": ["HrmTextForCausalLM"] if is_hrm else ["RecurrentLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers_per_stack": config.layers_per_stack,
        "num_hidden_layers": config.num_cache_slots,  # what a cache must hold: Transformers sizes its cache by it
        "num_attention_heads": config.num_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "embedding_scale": 1 / config.embedding_std,
        "initializer_range": config.embedding_std,
        "prefix_lm": config.prefix_lm,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        **special_ids,
    }
    if is_hrm:
        values |= {"H_cycles": config.H_cycles, "L_cycles": config.L_cycles, "L_bp_cycles": graded_fast_calls(config)}
    else:
        own = {name: getattr(config, name) for name in RECURRENCE[config.architecture]}
        values |= {"architecture": config.architecture, "norm": config.norm, **own}
    return values


def graded_fast_calls(config: ModelConfig) -> list[int]:
    """How many L calls of each H cycle carry gradient: the form in which Transformers keeps the gradient rule."""
    steps = plan(config)
    cycle = config.L_cycles + 1
    return [sum(s.grad for s in steps[start : start + config.L_cycles]) for start in range(0, len(steps), cycle)]


def config_from_json(values: Any, where: Path) -> ModelConfig:
    """The model that a config.json describes, ours or one that Transformers wrote; ``where`` names it in errors."""
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in (MODEL_TYPE, FAMILY_MODEL_TYPE):
        raise UserError(f"{where}: model_type is {kind!r}, expected {MODEL_TYPE!r}; this is not an hrm_text folder")
    unsupported = [key for key in ("attention_bias", "mlp_bias", "tie_word_embeddings") if values.get(key)]
    if unsupported or values.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: {', '.join(unsupported) or 'hidden_act'} is set; HRM-Text models have none of it")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{where}: rope_type {rope['rope_type']!r} is not supported, expected 'default'")
    architecture = values.get("architecture", "hrm")
    if architecture not in RECURRENCE:
        raise UserError(f"{where}: unknown architecture {architecture!r}; known are {', '.join(RECURRENCE)}")
    try:
        width, heads = values["hidden_size"], values["num_attention_heads"]
        # As in Transformers: without num_layers_per_stack, num_hidden_layers is the layers of one stack.
        per_stack = values.get("num_layers_per_stack") or values["num_hidden_layers"]
        scale = values.get("embedding_scale") or 1 / values["initializer_range"]
        lecun = math.isclose(scale, math.sqrt(width), rel_tol=1e-6)
        settings = {
            "architecture": architecture,
            "vocab_size": values["vocab_size"],
            "max_position_embeddings": values["max_position_embeddings"],
            "hidden_size": width,
            "num_layers": per_stack * (2 if architecture in ("hrm", "rins", "trm_match_recurrence") else 1),
            "num_heads": heads,
            "head_dim": values.get("head_dim") or width // heads,
            "norm": values.get("norm", "magic"),
            "norm_eps": values.get("rms_norm_eps", 1e-6),
            "rope_theta": rope.get("rope_theta", values.get("rope_theta", 10_000.0)),
            "init": "lecun" if lecun else "normal",
            "init_std": 0.02 if lecun else 1 / scale,
            "prefix_lm": values.get("prefix_lm", True),
            **inner_width(values["intermediate_size"], width),
        }
        if kind == MODEL_TYPE:
            settings |= recurrence_from_json(values)
        else:
            settings |= {name: values[name] for name in RECURRENCE[architecture]}
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: a value is not what it should be ({error})") from None
    return from_mapping(ModelConfig, settings, str(where))


def recurrence_from_json(values: Mapping[str, Any]) -> dict[str, int]:
    """Cycles and K of Transformers' configuration: there every H call carries gradient, and L_bp_cycles lists how many
    L calls of each H cycle do, with 1 in the places before a list that is too short.
    """
    h_cycles, l_cycles = values.get("H_cycles", 2), values.get("L_cycles", 3)
    listed = list(values.get("L_bp_cycles") or [2])
    per_cycle = ([1] * (h_cycles - len(listed)) + listed)[:h_cycles]
    graded = sum(min(count, l_cycles) for count in per_cycle)
    return {"H_cycles": h_cycles, "L_cycles": l_cycles, "bp_steps": h_cycles + max(1, graded)}


def inner_width(intermediate_size: int, hidden_size: int) -> dict[str, Any]:
    """Settings that give this inner width: the recipe's rule where it fits, otherwise the exact ratio."""
    multiple = 256
    by_rule = math.ceil(round(4.0 * hidden_size * 2 / 3) / multiple) * multiple
    if intermediate_size == by_rule:
        return {}
    return {"expansion": intermediate_size * 1.5 / hidden_size, "inner_multiple": 1}


def write_weights(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    special_ids: Mapping[str, int],
    condition: str | None = None,
) -> None:
    """Write config.json, generation_config.json and model.safetensors into an existing folder.

    ``condition`` is of prompts that name none; Transformers keeps the key, and makes nothing of it.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in empty(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert found == expected, f"tensors to write differ from the model's: {set(found.items()) ^ set(expected.items())}"
    ready = {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
    save_tensors(folder / "model.safetensors", ready, metadata={"format": "pt"})
    generation: dict[str, Any] = {**special_ids, "do_sample": False, "_from_model_config": False}
    if condition is not None:
        generation["condition"] = condition
    for name, values in {
        "config.json": config_to_json(config, dtype, special_ids),
        "generation_config.json": generation,
    }.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_model(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> RecurrentLM:
    """The model in a weights folder, ready to run (in evaluation mode, without gradients)."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected a weights folder with config.json and model.safetensors")
    config = config_from_json(read_json(folder / "config.json"), folder / "config.json")
    model = empty(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = fused({name: tensor.to(dtype) for name, tensor in read_tensors(folder).items()})
    check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, folder)
    model.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
    return model.requires_grad_(False).eval()


def empty(config: ModelConfig) -> RecurrentLM:
    """The model's structure without memory for its weights."""
    with torch.device("meta"):
        return RecurrentLM(config)


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Compare names and shapes of tensors; a difference is one error that names the first of each kind."""
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [name for name in expected if name in found and expected[name] != found[name]]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing, such as {missing[0]}")
    if surplus:
        problems.append(f"{len(surplus)} tensors do not belong, such as {surplus[0]}")
    if wrong:
        shapes = f"{list(found[wrong[0]])}, expected {list(expected[wrong[0]])}"
        problems.append(f"{len(wrong)} tensors have another shape, such as {wrong[0]}: {shapes}")
    if problems:
        raise UserError(
            f"{where}: {'; '.join(problems)}. The weights and the configuration belong to different models."
        )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_tensors(folder / "model.safetensors")
    shards = read_json(index)
    if not isinstance(shards, dict) or not isinstance(shards.get("weight_map"), dict):
        raise UserError(f"{index}: expected the key weight_map with the file of each tensor; copy the folder again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards["weight_map"].values())):
        tensors |= load_tensors(folder / name)
    return tensors


FUSED = {"attn.gqkv_proj": ("gate_proj", "q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and join tensors that were saved one projection each (``self_attn.q_proj``) as this project names them."""
    renamed = {name.replace(".self_attn.", ".attn."): tensor for name, tensor in tensors.items()}
    for whole, parts in FUSED.items():
        room = whole.split(".")[0]
        suffix = f".{room}.{parts[-1]}.weight"
        for base in [name.removesuffix(suffix) for name in list(renamed) if name.endswith(suffix)]:
            pieces = [renamed.pop(f"{base}.{room}.{part}.weight", None) for part in parts]
            if all(piece is not None for piece in pieces):
                renamed[f"{base}.{whole}.weight"] = torch.cat([piece for piece in pieces if piece is not None])
    return renamed
