"""Checkpoints: written whole, the newest few kept, read after a check of every file.

The layout of the folders and their reader are in ``model.checkpoint_files``, because exporting reads them too.
"""

from __future__ import annotations

import base64
import os
import platform
import random
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from hrm_text.files import sha256, whole_folder, write_json
from hrm_text.model.checkpoint_files import FORMAT, Checkpoint, is_complete, latest_good, load, step_folders, step_of
from hrm_text.model.tensorfile import save_tensors

__all__ = ["Checkpoint", "latest_good", "load", "restore_rng", "rng_state", "save"]


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    keep_last: int = 3,
) -> Path:
    """Write the checkpoint of ``step``, then delete all but the newest ``keep_last`` up to that step.

    ``tensors``: by file ("weights", "optimizer"), tensors by name or one level of named groups of them, as in
    ``AdamAtan2.state_dict()``. ``state`` must survive JSON and ``config`` YAML: plain values only.
    One process at a time may save to a root. Whatever goes wrong, earlier checkpoints stay as they are; a full disk is
    a UserError. Checkpoints of later steps (of a run that was set back) are never deleted.
    """
    if keep_last < 1:
        raise ValueError(f"expected keep_last >= 1, found {keep_last}")
    _clear_leftovers(root)
    folder = root / f"step_{step:08d}"
    with whole_folder(folder) as beside:
        write_json(beside / "state.json", dict(state))
        for name, values in tensors.items():
            save_tensors(beside / f"{name}.safetensors", _flat(values))
        (beside / "config.yaml").write_text(
            yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        files = {f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in sorted(beside.iterdir())}
        write_json(beside / "manifest.json", {"format": FORMAT, "step": step, "versions": _versions(), "files": files})
    _prune(root, step, keep_last)
    return folder


def rng_state() -> dict[str, Any]:
    """The random states of Python, of PyTorch on the CPU and, if in use, on the current CUDA device; fit for JSON."""
    kind, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [kind, list(words), gauss], "torch": _encoded(torch.get_rng_state())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _encoded(torch.cuda.get_rng_state())
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put back what ``rng_state`` gave; a CUDA state is left out on a machine without CUDA."""
    kind, words, gauss = state["python"]
    random.setstate((kind, tuple(words), gauss))
    torch.set_rng_state(_decoded(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decoded(state["cuda"]))


# ---------------------------------------------------------------------------------------------------------------------


def _prune(root: Path, step: int, keep_last: int) -> None:
    """Delete all older than the newest ``keep_last`` complete checkpoints up to ``step``; damaged ones do not count."""
    folders = [folder for folder in step_folders(root) if step_of(folder) <= step]
    kept = [folder for folder in folders if is_complete(folder)][-keep_last:]
    for folder in folders:
        if step_of(folder) < step_of(kept[0]):
            # Renamed first, so that a kill in the middle leaves a leftover and not half a checkpoint.
            doomed = root / f".{folder.name}.{os.getpid()}.tmp"
            os.replace(folder, doomed)
            shutil.rmtree(doomed)


def _clear_leftovers(root: Path) -> None:
    """Remove what a killed process left: half-written folders, and a replaced one unless it is the only copy."""
    for path in root.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(".step_*.old"):
        original = root / path.name.removeprefix(".").split(".")[0]
        if original.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.replace(path, original)


def _flat(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Groups of tensors as tensors named <group>/<name>; parameter names have dots, never slashes."""
    flat: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": tensor for key, tensor in value.items()}
        else:
            flat[name] = value
    return flat


def _versions() -> dict[str, str]:
    try:
        own = version("hrm-text")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "not installed"
    return {"hrm-text": own, "python": platform.python_version(), "torch": str(torch.__version__)}


def _encoded(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _decoded(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
