"""Sudoku of four rows with few blanks: every puzzle has one solution."""

from __future__ import annotations

import functools
import itertools
import random

from hrm_text.data.procedural.registry import Problem, task

BLANK = "0"
"""A digit like the others, so that a tokenizer makes one token of every cell: runs of ``_`` merge."""


@functools.cache
def grids() -> tuple[str, ...]:
    """All 288 filled grids: 16 digits each, row by row."""
    rows = ["".join(row) for row in itertools.permutations("1234")]

    def fits(cells: str) -> bool:
        columns = [cells[i::4] for i in range(4)]
        boxes = [cells[8 * y + 2 * x :][:2] + cells[8 * y + 4 + 2 * x :][:2] for y in (0, 1) for x in (0, 1)]
        return all(len(set(group)) == len(group) for group in columns + boxes)

    found = [""]
    for _ in range(4):
        found = [grid + row for grid in found for row in rows if fits(grid + row)]
    return tuple(found)


@functools.cache
def grids_with() -> dict[tuple[int, str], int]:
    """For each cell and digit, the set of filled grids that have it there, as bits of an integer."""
    bits = {(cell, digit): 0 for cell in range(16) for digit in "1234"}
    for i, grid in enumerate(grids()):
        for cell, digit in enumerate(grid):
            bits[cell, digit] |= 1 << i
    return bits


def has_one_solution(cells: list[str]) -> bool:
    """Whether exactly one filled grid agrees with the digits given."""
    candidates = -1
    with_digit = grids_with()
    for cell, digit in enumerate(cells):
        if digit != BLANK:
            candidates &= with_digit[cell, digit]
    return candidates > 0 and candidates & (candidates - 1) == 0


def in_rows(cells: str | list[str]) -> str:
    """Four rows of four, a space between them."""
    text = "".join(cells)
    return f"{text[:4]} {text[4:8]} {text[8:12]} {text[12:]}"


@task(
    "sudoku4",
    chance=0.01,
    wordings=("Sudoku {grid}", "Solve {grid}", "Fill the blanks: {grid}"),
    conditions={"direct": 0.84, "noisy": 0.08, "synth": 0.08},
    sentence="The solution is {answer}.",
)
def sudoku4(rng: random.Random) -> Problem:
    """A grid of four rows with three to six blanks, filled."""
    solution = grids()[int(rng.random() * 288)]
    while True:
        cells = list(solution)
        for cell in rng.sample(range(16), 3 + int(rng.random() * 4)):
            cells[cell] = BLANK
        if has_one_solution(cells):
            puzzle = in_rows(cells)
            return Problem(puzzle, {"grid": puzzle}, in_rows(solution))
