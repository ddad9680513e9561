"""Where the time of a training step goes: the kernels of a profile, by the part of the step that they belong to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hrm_text.train.step import HEAD_AND_LOSS, OPTIMIZER

STEP = "profiled step"

PARTS = {
    "attention backward": r"attention_backward|(flash|fmha).*(bwd|backward)",
    "attention forward": r"attention|flash|fmha|triton_tem_",  # inductor calls its FlexAttention triton_tem_...
    HEAD_AND_LOSS: r"cross_entropy",
    OPTIMIZER: r"adam_atan2|multi_tensor_apply",
    "matrix products": r"nvjet|cutlass|gemm|xmma|cublas|splitk",
    "elementwise and norms": r"rms_norm|rotary|swiglu|gate|quantise|triton_(poi|red|per)_|elementwise|reduce_kernel",
    "copies": r"memcpy|memset|copy|catarray",
}
"""Part -> what the names of its kernels hold; the first that fits counts. Whatever runs within the ranges that the step
marks belongs to these: the head and the loss, the optimizer."""

OTHER, IDLE = "other", "idle"

NAME_LENGTH = 60
"""Letters shown of a kernel's name: those of C++ templates go on for hundreds."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """Something that the device did, from ``start`` to ``end`` in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class StepProfile:
    """The milliseconds of one step."""

    ms_by_part: dict[str, float]
    """Every part of PARTS, the rest ("other"), and the time in which nothing ran ("idle")."""
    largest_others: list[str]
    """The kernels that took the most of "other", three at most, by the first letters of their names."""


def profile_step(run: Callable[[], object]) -> StepProfile:
    """Profile the second of two steps on the CUDA device; the first keeps it busy while the second is launched."""
    torch.cuda.synchronize()
    # acc_events matters to several cycles of recording alone, but where it is off the profiler warns of them.
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        with record_function(STEP):
            run()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    return sorted_by_part(Kernel(event.name, event.time_range.start, event.time_range.end) for event in events)


def sorted_by_part(events: Iterable[Kernel]) -> StepProfile:
    """Sort the kernels of the range STEP, which is among the events as are the ranges that the step marks."""
    ranges: dict[str, list[Kernel]] = {STEP: [], HEAD_AND_LOSS: [], OPTIMIZER: []}
    kernels: list[Kernel] = []
    for event in events:
        ranges.get(event.name, kernels).append(event)
    if ranges[STEP]:
        kernels = [kernel for kernel in kernels if _within(kernel, ranges[STEP])]
    kernels.sort(key=lambda kernel: kernel.start)
    ms_by_part = dict.fromkeys([*PARTS, OTHER, IDLE], 0.0)
    others: dict[str, float] = {}
    busy_until = kernels[0].start if kernels else 0.0
    for kernel in kernels:
        marked = next((part for part in (HEAD_AND_LOSS, OPTIMIZER) if _within(kernel, ranges[part])), None)
        part = marked or part_of(kernel.name)
        # Kernels of two streams may overlap: each counts from where the ones before it ended.
        ms_by_part[IDLE] += max(0.0, kernel.start - busy_until) / 1e3
        ms = max(0.0, kernel.end - max(kernel.start, busy_until)) / 1e3
        busy_until = max(busy_until, kernel.end)
        ms_by_part[part] += ms
        if part == OTHER:
            others[kernel.name] = others.get(kernel.name, 0.0) + ms
    largest = sorted(others, key=lambda name: -others[name])[:3]
    return StepProfile(ms_by_part, [f"{shortened(name)} ({others[name]:.2f} ms)" for name in largest])


def part_of(name: str) -> str:
    """The part that a kernel of this name belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def shortened(name: str) -> str:
    """A kernel's name in NAME_LENGTH letters at most."""
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def _within(kernel: Kernel, ranges: list[Kernel]) -> bool:
    return any(outer.start <= kernel.start < outer.end for outer in ranges)
