"""Reading numbers off the device without waiting for the step that has just been launched."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

What = TypeVar("What")


@dataclass(frozen=True)
class _Pending(Generic[What]):
    """Numbers on their way to the host."""

    numbers: Tensor
    arrived: torch.cuda.Event | None
    what: What

    def read(self) -> tuple[What, list[float]]:
        if self.arrived is not None:
            self.arrived.synchronize()
        numbers: list[float] = self.numbers.tolist()
        return self.what, numbers


class Readback(Generic[What]):
    """A queue of small tensors that come back in order, each once ``late`` others have been launched behind it.

    With ``late`` = 1 the device always has a step to work on while the host reads the one before. A CUDA tensor is
    copied to pinned memory at once, and only its reading waits, for that copy alone.
    """

    def __init__(self, late: int) -> None:
        assert late >= 0
        self.late = late
        self._pending: deque[_Pending[What]] = deque()

    def put(self, numbers: Tensor, what: What) -> None:
        """Send for the numbers [n] of ``what``."""
        arrived = None
        if numbers.device.type == "cuda":
            pinned = torch.empty_like(numbers, device="cpu", pin_memory=True)
            numbers = pinned.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(_Pending(numbers, arrived, what))

    def due(self) -> Iterator[tuple[What, list[float]]]:
        """What may be read by now, oldest first."""
        while len(self._pending) > self.late:
            yield self._pending.popleft().read()

    def all(self) -> Iterator[tuple[What, list[float]]]:
        """Everything, oldest first; waits for the last step."""
        while self._pending:
            yield self._pending.popleft().read()
