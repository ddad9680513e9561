"""The layout of a training checkpoint, and how one process reads it: a folder per step, every file under a checksum.

    <root>/step_00001200/
        rank_00000_00.safetensors   what one rank wrote of the tensors, in as many files as it takes
        state.json                  what the trainer needs to continue: loader position, random states, counters
        config.yaml                 the resolved config of the run
        manifest.json               format, step, versions, size and SHA-256 of each file, where each tensor lies

Tensors are named <group>/<name>: ``weights/`` are the model's parameters in fp32, whatever they were computed in, and
its buffers; ``exp_avg/``, ``exp_avg_sq/`` and ``ema/`` are the optimizer's, fp32; ``step`` counts its steps. A tensor
that was sharded lies in several files, as chunks that the manifest lists with their offsets. However many ranks wrote
it, one process can read all of it.

Nothing is pickled, so opening a stranger's checkpoint runs no code. ``train.checkpoint`` writes these folders.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.files import read_json, sha256
from hrm_text.model.config import ModelConfig
from hrm_text.model.tensorfile import DTYPE_CODES, opened, read_part
from hrm_text.model.weights import check_shapes, empty
from hrm_text.settings import from_mapping, read_yaml

FORMAT = 2
"""Counts up when the layout changes so that an older reader would misread it. 1 had one file of weights and one of
optimizer state, from one process."""

HASHED_AT_ONCE = 4
"""Files that are read to compare their checksums at the same time: one thread alone hashes 0.5 to 2 GB a second."""

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_CODES}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor, and where it lies."""

    file: str
    name: str
    """Of the block in that file."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """What the manifest says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class SavedState:
    """All of a checkpoint but the content of its tensors."""

    step: int
    """Steps finished."""
    state: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    """What wrote it: python, torch and hrm-text."""
    tensors: dict[str, SavedTensor]


def load_state(folder: Path) -> SavedState:
    """All of a checkpoint but the content of its tensors; the checksums are not compared (``latest_good`` does)."""
    manifest = read_manifest(folder)
    state, config = read_json(folder / "state.json"), read_yaml(folder / "config.yaml")
    return SavedState(manifest["step"], state, config, manifest["versions"], saved_tensors(folder, manifest))


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, whole and on the CPU, however they were sharded."""
    saved = saved_tensors(folder, read_manifest(folder))
    return assembled(folder, {name: tensor for name, tensor in saved.items() if name.startswith(prefix)})


def read_weights(folder: Path, *, raw: bool = False) -> dict[str, Tensor]:
    """The averaged weights by parameter, or the ``raw`` ones of the last step, in fp32, and all buffers by name."""
    saved = saved_tensors(folder, read_manifest(folder))
    places: dict[str, str] = {}  # of each parameter or buffer in the checkpoint
    for group in ("weights/",) if raw else ("weights/", "ema/"):
        found = {name.removeprefix(group): name for name in saved if name.startswith(group)}
        if not found and group == "ema/":
            raise UserError(f"{folder}: holds no averaged weights; --raw exports the weights of the last step")
        places |= found
    tensors = assembled(folder, {place: saved[place] for place in places.values()})
    return {name: tensors[place] for name, place in places.items()}


def read_model_tensors(folder: Path, *, raw: bool = False) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of a checkpoint: its configuration and its weights (``read_weights``).

    Raises:
        UserError: the checkpoint holds no averaged weights, or tensors of another model than its config says.
    """
    path = folder / "config.yaml"
    config = from_mapping(ModelConfig, read_yaml(path).get("model"), f"{path}: model")
    tensors = read_weights(folder, raw=raw)
    expected = {name: tuple(tensor.shape) for name, tensor in empty(config).state_dict().items()}
    check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, folder)
    return config, tensors


def find_checkpoint(path: Path, warn: Callable[[str], Any]) -> Path:
    """The checkpoint that a path means: itself, or the newest good one of a run or of a folder of checkpoints.

    Every file of it has been compared with its checksum.
    """
    if (path / "manifest.json").is_file():
        verified_manifest(path)
        return path
    for root in (path / "checkpoints", path):
        if step_folders(root):
            found = latest_good(root, warn)
            assert found is not None
            return found
    what = "is not there" if not path.exists() else "holds no checkpoint"
    raise UserError(
        f"{path}: {what}; expected the folder of a training run, or one of its checkpoints "
        "(RUN/checkpoints/step_00001200)"
    )


def latest_good(root: Path, warn: Callable[[str], Any]) -> Path | None:
    """The newest checkpoint under ``root`` that is complete and unchanged; None when there is no checkpoint at all.

    A damaged newer one is named through ``warn`` and passed over. When all are damaged, a UserError names each: to
    start over silently would overwrite what might be saved.
    """
    return newest_without_damage(root, reversed(step_folders(root)), damage_of, warn)


def newest_without_damage(
    root: Path, folders: Iterable[Path], damage: Callable[[Path], str | None], warn: Callable[[str], Any]
) -> Path | None:
    """The first folder without damage, after naming those before it; None for no folder; UserError if there is none."""
    damages: list[str] = []
    for folder in folders:
        found = damage(folder)
        if found is None:
            for text in damages:
                warn(f"{text} Continuing from the previous good one: {folder}")
            return folder
        damages.append(found)
    if damages:
        listed = "\n".join(f"  {text}" for text in damages)
        raise UserError(
            f"{root}: none of its {len(damages)} checkpoints can be used:\n{listed}\n"
            "Restore one of them from a copy, or start a new run in another folder."
        )
    return None


def step_folders(root: Path) -> list[Path]:
    """The checkpoint folders under a root, whatever their condition, oldest first."""
    found = [path for path in root.glob("step_*") if path.is_dir() and re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; a missing, damaged, older or newer one is a UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder}: not a complete checkpoint, manifest.json is missing; use another checkpoint.")
    manifest = read_json(path)
    keys = ("format", "step", "versions", "files")
    if not isinstance(manifest, dict) or not set(keys) <= set(manifest):
        raise UserError(f"{path}: damaged, expected the keys {', '.join(keys)}; use another checkpoint.")
    if manifest["format"] != FORMAT:
        wrote = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
        raise UserError(
            f"{path}: checkpoint format {manifest['format']}, expected {FORMAT}; it was written by {wrote}: "
            "use that version, to go on or to export its weights."
        )
    return manifest


def saved_tensors(folder: Path, manifest: Mapping[str, Any]) -> dict[str, SavedTensor]:
    """What a manifest says of the tensors, by name."""
    try:
        tensors = {
            name: SavedTensor(
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                tuple(
                    Chunk(chunk["file"], chunk["name"], tuple(chunk["offset"]), tuple(chunk["shape"]))
                    for chunk in entry["chunks"]
                    if manifest["files"][chunk["file"]]
                ),
            )
            for name, entry in manifest["tensors"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'manifest.json'}: damaged, its list of tensors cannot be read ({error!r}); "
            "use another checkpoint."
        ) from None
    for name, tensor in tensors.items():
        if sum(math.prod(chunk.shape) for chunk in tensor.chunks) != math.prod(tensor.shape):
            raise UserError(
                f"{folder / 'manifest.json'}: damaged, the chunks of {name} are not the whole of it; "
                "use another checkpoint."
            )
    return tensors


def assembled(folder: Path, tensors: Mapping[str, SavedTensor]) -> dict[str, Tensor]:
    """The content of these tensors, each whole; every file is opened once."""
    parts: dict[str, list[tuple[str, Chunk]]] = defaultdict(list)
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        for chunk in tensor.chunks:
            parts[chunk.file].append((name, chunk))
    for file_name, chunks in parts.items():
        with opened(folder / file_name) as file:
            for name, chunk in chunks:
                block = tuple(slice(start, start + size) for start, size in zip(chunk.offset, chunk.shape, strict=True))
                whole[name][block] = read_part(file, chunk.name, (0,) * len(chunk.shape), chunk.shape)
    return whole


def verified_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, once every file has been compared with it."""
    manifest = read_manifest(folder)
    saved_tensors(folder, manifest)
    damages = damaged_files(folder, manifest["files"])
    if damages:
        raise UserError(damages[0])
    return manifest


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        verified_manifest(folder)
    except UserError as error:
        return str(error)
    return None


def damaged_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with each of these files that is not what the manifest says, in order."""

    def damage(name: str) -> str | None:
        path, expected = folder / name, files[name]
        if not path.exists():
            return f"{path}: missing from the checkpoint; use another checkpoint."
        if (size := path.stat().st_size) != expected["size"]:
            return f"{path}: damaged, found {size:,} bytes, expected {expected['size']:,}; use another checkpoint."
        try:
            found = sha256(path)
        except OSError as error:  # what a dying disk says
            return f"{path}: damaged, cannot be read ({error.strerror}); use another checkpoint."
        if found != expected["sha256"]:
            return (
                f"{path}: damaged, found SHA-256 {found[:12]}..., expected {expected['sha256'][:12]}...; "
                "use another checkpoint."
            )
        return None

    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return [found for found in pool.map(damage, sorted(files)) if found is not None]


def is_complete(folder: Path) -> bool:
    """Whether every file is there with its size: the check that is cheap enough for every save."""
    try:
        files = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == expected["size"] for name, expected in files.items())
    except (UserError, FileNotFoundError):
        return False
