"""What a result was made with, and on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from hrm_text import __version__


def versions() -> dict[str, str]:
    """What the run was made with."""
    found = {"hrm-text": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "tokenizers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
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
