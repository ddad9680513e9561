"""Before anything is imported: without a GPU, Triton's interpreter runs the kernels on CPU tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    """A first loop that numba runs in threads gives PyTorch as many as there are cores, whatever it was told to take.

    With a worker for each core they would spin, waiting for each other, in all tests that come after.
    """
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
