"""What a result was made with, and on."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import torch

from hrm_text import __version__


def versions() -> dict[str, str]:
    """What the run was made with."""
    own = {"hrm-text": __version__, "python": platform.python_version()}
    return own | installed(("torch", "numpy", "tokenizers", "safetensors"))


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are there."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine(device: str) -> dict[str, str]:
    """What the run was made on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "device": f"{device}: {name}",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
