"""Trained weights wherever they lie: a weights folder, a checkpoint, or the newest good checkpoint of a run.

What training starts from (``init``), and what the adapters of a checkpoint are merged into.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.files import read_json
from hrm_text.model.checkpoint_files import find_checkpoint, load_state, read_model_tensors, read_tensors, step_folders
from hrm_text.model.config import ModelConfig
from hrm_text.model.lora import LoraConfig, merged
from hrm_text.model.weights import config_from_json, read_model
from hrm_text.settings import from_mapping, read_yaml

_CHUNK = 1 << 24
"""Elements hashed at a time."""


@dataclass(frozen=True)
class Origin:
    """Trained weights, found and not yet read."""

    folder: Path
    """A weights folder or a checkpoint."""
    config: ModelConfig
    tokenizer: Path
    """Folder of the tokenizer that the model was trained with."""
    is_checkpoint: bool

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, fp32 on the CPU: of a checkpoint, the averaged ones.

        Raises:
            UserError: a file is damaged, or the tensors are of another model.
        """
        if self.is_checkpoint:
            return model_tensors(self.folder)[1]
        return dict(read_model(self.folder).state_dict())


def find_origin(path: Path, warn: Callable[[str], Any] = warnings.warn) -> Origin:
    """The weights that a path means: a weights folder, a checkpoint, or the newest good checkpoint of a run.

    ``warn`` is told of damaged checkpoints that were passed over.

    Raises:
        UserError: there are none, or a checkpoint is damaged.
    """
    if (path / "config.json").is_file():
        config = config_from_json(read_json(path / "config.json"), path / "config.json")
        return Origin(path, config, path, is_checkpoint=False)
    if not (path / "manifest.json").is_file() and not any(step_folders(root) for root in (path / "checkpoints", path)):
        what = "is not there" if not path.exists() else "holds no weights"
        raise UserError(
            f"{path}: {what}; expected a weights folder (config.json and model.safetensors), the folder of a training "
            "run, or one of its checkpoints (RUN/checkpoints/step_00001200)"
        )
    folder = find_checkpoint(path, warn)
    config = from_mapping(
        ModelConfig, read_yaml(folder / "config.yaml").get("model"), f"{folder / 'config.yaml'}: model"
    )
    info = read_json(folder / "state.json").get("tokenizer_info") or {}
    return Origin(folder, config, Path(info.get("tokenizer_path") or "unnamed"), is_checkpoint=True)


def model_tensors(folder: Path, *, raw: bool = False) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of a checkpoint as ``read_model_tensors`` gives it; adapters are merged into the weights below them.

    Raises:
        UserError: as there; or what the adapters were trained upon is not there any more, or is another model by now.
    """
    saved = load_state(folder)
    if not (saved.config.get("lora") or {}).get("rank"):
        return read_model_tensors(folder, raw=raw)
    lora = from_mapping(LoraConfig, saved.config["lora"], f"{folder / 'config.yaml'}: lora")
    config = from_mapping(ModelConfig, saved.config.get("model"), f"{folder / 'config.yaml'}: model")
    group = "weights/" if raw else "ema/"
    adapters = {name.removeprefix(group): tensor for name, tensor in read_tensors(folder, group).items()}
    return config, merged(base_of_adapters(folder, saved.state["base"]), adapters, lora, config)


def base_of_adapters(folder: Path, noted: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights that adapters were trained upon, after checking that they are those.

    ``noted``: ``path`` and ``sha256``, as a checkpoint's state.json has them under ``base``.
    """
    again = f"{folder} holds adapters alone, trained upon the weights at {noted['path']}"
    try:
        weights = find_origin(Path(noted["path"])).weights()
    except UserError as error:
        raise UserError(f"{again}, which cannot be read: {error}. Put them back there.") from None
    if (found := checksum(weights)) != noted["sha256"]:
        raise UserError(
            f"{again}, and these are other weights now: SHA-256 {found[:12]}..., expected {noted['sha256'][:12]}...; "
            "put the former ones back there."
        )
    return weights


def checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and fp32 values: the same for the same weights, in whichever files they lie."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        for piece in tensor.detach().to("cpu", torch.float32).contiguous().flatten().split(_CHUNK):
            digest.update(memoryview(piece.numpy()).cast("B"))
    return digest.hexdigest()
