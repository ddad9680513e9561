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

OTHER, IDLE, COMMUNICATION = "other", "idle", "communication, exposed"
COMMUNICATION_KERNELS = r"nccl"
"""In the names of kernels that exchange something with other ranks. They run beside the others; what they take while
nothing else runs is exposed: the step waits for it."""
RANGES_OF_FSDP = "FSDP::"
"""How the ranges begin that FSDP marks, which are no kernels."""

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
    """Every part of PARTS, the rest ("other"), exposed communication, and the time in which nothing ran ("idle")."""
    hidden_communication_ms: float
    """Of exchanges with other ranks while other kernels ran."""
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
        if not event.name.startswith(RANGES_OF_FSDP):
            ranges.get(event.name, kernels).append(event)
    if ranges[STEP]:
        # To the end of the profile: with kernels on several streams, the range of the step may end early.
        begin = min(step.start for step in ranges[STEP])
        kernels = [kernel for kernel in kernels if kernel.start >= begin]
    kernels.sort(key=lambda kernel: kernel.start)
    exchanges = [kernel for kernel in kernels if re.search(COMMUNICATION_KERNELS, kernel.name, re.IGNORECASE)]
    computing = [kernel for kernel in kernels if not re.search(COMMUNICATION_KERNELS, kernel.name, re.IGNORECASE)]
    ms_by_part = dict.fromkeys([*PARTS, OTHER, COMMUNICATION, IDLE], 0.0)
    others: dict[str, float] = {}
    busy_until = 0.0
    for kernel in computing:
        marked = next((part for part in (HEAD_AND_LOSS, OPTIMIZER) if _within(kernel, ranges[part])), None)
        part = marked or part_of(kernel.name)
        # Kernels of two streams may overlap: each counts from where the ones before it ended.
        ms = max(0.0, kernel.end - max(kernel.start, busy_until)) / 1e3
        busy_until = max(busy_until, kernel.end)
        ms_by_part[part] += ms
        if part == OTHER:
            others[kernel.name] = others.get(kernel.name, 0.0) + ms
    busy, exchanging = _busy_ms(kernels), _busy_ms(exchanges)
    ms_by_part[COMMUNICATION] = busy - _busy_ms(computing)
    if kernels:
        ms_by_part[IDLE] = (max(kernel.end for kernel in kernels) - kernels[0].start) / 1e3 - busy
    largest = sorted(others, key=lambda name: -others[name])[:3]
    shown = [f"{shortened(name)} ({others[name]:.2f} ms)" for name in largest]
    return StepProfile(ms_by_part, exchanging - ms_by_part[COMMUNICATION], shown)


def _busy_ms(kernels: Iterable[Kernel]) -> float:
    """Milliseconds in which at least one of the kernels runs; they are sorted by their start."""
    total, busy_until = 0.0, 0.0
    for kernel in kernels:
        total += max(0.0, kernel.end - max(kernel.start, busy_until))
        busy_until = max(busy_until, kernel.end)
    return total / 1e3


def part_of(name: str) -> str:
    """The part that a kernel of this name belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def shortened(name: str) -> str:
    """A kernel's name in NAME_LENGTH letters at most."""
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def _within(kernel: Kernel, ranges: list[Kernel]) -> bool:
    return any(outer.start <= kernel.start < outer.end for outer in ranges)
