"""Files of named tensors (safetensors), written piece by piece and read by name.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of the header, the header in JSON with
the dtype, shape and place of each tensor, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hrm_text.contracts import UserError

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes that a file may hold, and what the format calls them."""

PIECE_BYTES = 16 << 20
"""What is written at once: enough to be fast; in between, other threads of the process get their turn."""


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    observe: Callable[[memoryview], object] | None = None,
) -> None:
    """Write tensors by name to a file in a folder that exists, one that a ``whole_folder`` gave.

    Written is tensor by tensor, so that the memory of one copy of the largest is enough, and none where a tensor is
    contiguous on the CPU. ``observe`` is shown all that is written, in order: a checksum's ``update``.

    Raises:
        OSError: the system refused, with its errno (a full disk is ENOSPC), for ``whole_folder`` to explain.
    """
    # Larger elements first: so each tensor begins at a multiple of its element size, as readers that map files need.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.unlink(missing_ok=True)  # what was read from a file of this name may still be mapped to it
    with path.open("xb", buffering=0) as file:

        def write(data: memoryview) -> None:
            while data:
                piece = data[:PIECE_BYTES]
                written = file.write(piece)
                if observe is not None:
                    observe(piece[:written])
                data = data[written:]

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for name in names:
            if tensors[name].numel():
                flat = tensors[name].detach().cpu().contiguous().reshape(-1)
                write(flat.view(torch.uint8).numpy().data)


def load_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose names begin with ``prefix``, on the CPU; the others are not read.

    Raises:
        UserError: the file is missing or damaged.
    """
    with opened(path) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is no mapping)
        return {name: file.get_tensor(name) for name in names}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file to read by name: ``get_tensor(name)``, or ``get_slice(name)[begin:end]``, which reads no more than that.

    Raises:
        UserError: the file is missing or damaged, on opening or while it is read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error}); copy it again") from None


def read_part(file: Any, name: str, begin: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The block of this shape that begins at these indices of a tensor, from a file that is ``opened``."""
    part = file.get_slice(name)
    if not shape or (list(shape) == part.get_shape() and not any(begin)):
        return file.get_tensor(name)
    return part[tuple(slice(start, start + size) for start, size in zip(begin, shape, strict=True))]
