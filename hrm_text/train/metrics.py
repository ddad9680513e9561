"""Speed, utilisation and memory of training."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

PEAK_FLOPS = {
    # NVIDIA and AMD data sheets: dense (half of what is printed "with sparsity"), bf16 in, fp32 accumulation.
    # A more special name stands before the name that it contains.
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}
"""Peak FLOP/s of a device in bf16 or fp16, by a part of the name that PyTorch gives it."""


def peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Peak FLOP/s of one device in a dtype of 16 bits; None where it is not known: CPU, MPS, fp32, a slice of a GPU."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """Peak FLOP/s by device name, such as "NVIDIA H100 80GB HBM3"; None for a name that is not known."""
    if re.search(r"\bMIG\b", name):  # a slice has a part of the peak, and its name does not tell which
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def device_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: tensors on a CUDA device, otherwise resident memory.

    On MPS it is what the driver holds at this moment: there is no record of the most.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:  # on Linux ru_maxrss is inherited from the parent through exec: it may be the shell's or the launcher's
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    except FileNotFoundError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, the others KiB


def device_memory_total(device: torch.device) -> int | None:
    """Bytes of memory that a device has to itself; None for one that shares the machine's."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast the last few steps were."""

    seconds: float
    """Wall time of the last step alone: since the step before it, or since the last pause."""
    tokens_per_second: float
    mfu: float | None
    """Model FLOPs utilisation: the plan's FLOPs over the peak's, 0 to 1; None where the peak is not known."""


class Throughput:
    """Times the steps of a run by the moments at which their results arrive, whenever they were launched::

        meter.start()                                    # and again after a pause, such as validation or saving
        ...                                              # steps are launched, and the results of one arrive
        rate = meter.lap(tokens=tokens, flops=flops)

    Laps between two starts add up to the time that passed, so launching ahead of the device cannot look like speed.
    Rates are over the last ``window`` steps together.
    """

    def __init__(
        self, peak_flops: float | None = None, window: int = 10, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """``peak_flops``: FLOP/s of all devices of the run together."""
        self._peak_flops = peak_flops
        self._clock = clock
        self._steps: deque[tuple[float, int, float]] = deque(maxlen=window)
        self._last: float | None = None

    def start(self) -> None:
        """Begin to count."""
        self._last = self._clock()

    def lap(self, tokens: int, flops: float) -> Rate:
        """A step is done; ``tokens`` and ``flops`` are of all devices together."""
        assert self._last is not None, "lap() without start()"
        now = self._clock()
        seconds, self._last = now - self._last, now
        self._steps.append((seconds, tokens, flops))
        window_seconds = max(sum(step[0] for step in self._steps), 1e-9)  # a clock may stand still
        mfu = None
        if self._peak_flops is not None:
            mfu = sum(step[2] for step in self._steps) / window_seconds / self._peak_flops
        return Rate(seconds, sum(step[1] for step in self._steps) / window_seconds, mfu)
