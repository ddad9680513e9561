"""Time on the device, which runs behind the host."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Times what runs inside it, again and again: by events on CUDA, by the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[torch.cuda.Event | float] = []

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *_: object) -> None:
        self._mark()

    def milliseconds(self) -> list[float]:
        """Of each time that something ran inside."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        times = []
        for start, end in zip(self.marks[::2], self.marks[1::2], strict=True):
            if isinstance(start, float) or isinstance(end, float):
                assert isinstance(start, float) and isinstance(end, float)
                times.append(1e3 * (end - start))
            else:
                times.append(start.elapsed_time(end))
        return times

    def _mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
            return
        if self.device.type == "mps":
            torch.mps.synchronize()
        self.marks.append(time.perf_counter())
