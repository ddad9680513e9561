"""HRM-Text: pretraining hierarchical recurrent language models from scratch on a small budget.

model = hrm_text.load("WEIGHTS_DIR")                       # a weights folder, ours or one that Transformers wrote
model.generate(["What is 2 + 2?"], condition="direct")
core = hrm_text.build(hrm_text.preset("B"))                # an untrained torch module
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["build", "load", "preset"]

if TYPE_CHECKING:
    from hrm_text.infer.text_model import load
    from hrm_text.model.config import preset
    from hrm_text.model.recurrence import build

_HOMES = {"load": "hrm_text.infer.text_model", "build": "hrm_text.model.recurrence", "preset": "hrm_text.model.config"}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that importing the package stays free of torch."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'hrm_text' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
