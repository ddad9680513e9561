"""Before anything is imported: without a GPU, Triton's interpreter runs the kernels on CPU tensors."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
