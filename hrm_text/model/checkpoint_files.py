"""The layout of a training checkpoint, and how to read it: a folder per step, every file under a checksum.

    <root>/step_00001200/
        weights.safetensors      the model's parameters in their own dtype
        optimizer.safetensors    step, exp_avg/<parameter>, exp_avg_sq/<parameter>, ema/<parameter>, master/<parameter>
        state.json               what the trainer needs to continue: loader position, random states, counters
        config.yaml              the resolved config of the run
        manifest.json            format, step, versions, size and SHA-256 of each file above; written last

Nothing is pickled, so opening a stranger's checkpoint runs no code. ``train.checkpoint`` writes these folders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.files import read_json, sha256
from hrm_text.model.tensorfile import load_tensors
from hrm_text.settings import read_yaml

FORMAT = 1
"""Counts up when the layout changes so that an older reader would misread it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run needs to continue as if it had not stopped."""

    step: int
    """Steps finished."""
    tensors: dict[str, dict[str, Any]]
    """Per file ("weights", "optimizer"), tensors by name or groups of them, on the CPU."""
    state: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    """What wrote it: python, torch and hrm-text."""


def load(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint after comparing every file with its checksum; damage is a UserError that names the file.

    ``verify=False`` is for a folder that ``latest_good`` has just verified: hashing 20 GB takes a while.
    """
    manifest = verified_manifest(folder) if verify else read_manifest(folder)
    tensors = {
        Path(name).stem: _grouped(load_tensors(folder / name))
        for name in manifest["files"]
        if name.endswith(".safetensors")
    }
    state, config = read_json(folder / "state.json"), read_yaml(folder / "config.yaml")
    return Checkpoint(manifest["step"], tensors, state, config, manifest["versions"])


def latest_good(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint under ``root`` that is complete and unchanged; None when there is no checkpoint at all.

    A damaged newer one is named through ``warn`` and passed over. When all are damaged, a UserError names each: to
    start over silently would overwrite what might be saved.
    """
    damages: list[str] = []
    for folder in reversed(step_folders(root)):
        try:
            verified_manifest(folder)
        except UserError as error:
            damages.append(str(error))
        else:
            for damage in damages:
                warn(f"{damage} Continuing from the previous good one: {folder}")
            return folder
    if damages:
        listed = "\n".join(f"  {damage}" for damage in damages)
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
    """The manifest of a checkpoint; a missing, damaged or newer one is a UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder}: not a complete checkpoint, manifest.json is missing; use another checkpoint.")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not {"format", "step", "versions", "files"} <= set(manifest):
        raise UserError(f"{path}: damaged, expected the keys format, step, versions and files; use another checkpoint.")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {manifest['format']}, expected {FORMAT}; "
            f"use the version that wrote it ({manifest['versions']})."
        )
    return manifest


def verified_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, once every file has been compared with it."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.exists():
            raise UserError(f"{path}: missing from the checkpoint; use another checkpoint.")
        if (size := path.stat().st_size) != expected["size"]:
            raise UserError(
                f"{path}: damaged, found {size:,} bytes, expected {expected['size']:,}; use another checkpoint."
            )
        if (found := sha256(path)) != expected["sha256"]:
            raise UserError(
                f"{path}: damaged, found SHA-256 {found[:12]}..., expected {expected['sha256'][:12]}...; "
                "use another checkpoint."
            )
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether every file is there with its size: the check that is cheap enough for every save."""
    try:
        files = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == expected["size"] for name, expected in files.items())
    except (UserError, FileNotFoundError):
        return False


def _grouped(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors named <group>/<name> as groups of tensors; an empty group is not there."""
    grouped: dict[str, Any] = {}
    for name, tensor in flat.items():
        group, slash, key = name.partition("/")
        if slash:
            grouped.setdefault(group, {})[key] = tensor
        else:
            grouped[name] = tensor
    return grouped
