"""Files of named tensors (safetensors), written with the permissions and the error messages of any other file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hrm_text.contracts import UserError


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name to a file in a folder that exists, one that a ``whole_folder`` gave.

    Raises:
        OSError: the system refused, with its errno (a full disk is ENOSPC), for ``whole_folder`` to explain.
    """
    path.touch()
    mode = path.stat().st_mode
    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(ready, path, None if metadata is None else dict(metadata))
    except SafetensorError as error:  # the library wraps what the system said in a type of its own
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(mode)  # the library replaces the file by one that its owner alone may read


def load_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose names begin with ``prefix``, on the CPU; the others are not read.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is no mapping)
            return {name: file.get_tensor(name) for name in names}
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error}); copy it again") from None
