"""Instruction-response records of our own making: small tasks whose problems are drawn, not stored.

A task draws problems; a wording and a condition turn a problem into an example; the SHA-256 of the problem decides on
which side of the split it lies. A task is added by one decorated function in a family module.
"""

from __future__ import annotations

from hrm_text.data.procedural import (  # noqa: F401  the families fill TASKS
    arithmetic,
    long_arithmetic,
    long_numbers,
    long_strings,
    maze,
    numbers,
    reading,
    strings,
    sudoku4,
    sudoku9,
    word_problems,
)
from hrm_text.data.procedural.mixture import CPU_WEIGHTS, HeldOutItem, generate, held_out_items
from hrm_text.data.procedural.registry import TASKS, Problem, Task, find_task
from hrm_text.data.procedural.rendering import answer_of
from hrm_text.data.procedural.split import is_held_out

__all__ = [
    "CPU_WEIGHTS",
    "TASKS",
    "HeldOutItem",
    "Problem",
    "Task",
    "answer_of",
    "find_task",
    "generate",
    "held_out_items",
    "is_held_out",
]
