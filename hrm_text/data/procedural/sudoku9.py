"""Sudoku of nine rows, easy and hard: base puzzles of our own making, each shown in many symmetric forms.

A base puzzle is a pure function of its number. The split goes by base puzzle: no form of a held-out one is trained on.
Easy means that naked and hidden singles alone solve it; hard, that they do not and every digit given is needed.
Making them costs 4 ms (easy) and 90 ms (hard) each, once in a process; a form of one costs 25 us.
"""

from __future__ import annotations

import functools
import random

from hrm_text.data.procedural.registry import Problem, task

BLANK = "0"
EASY_BASES = 3000
HARD_BASES = 1000
ALL = 0x1FF
"""The nine digits as bits: digit d is bit d - 1."""
UNITS = (
    [[9 * r + c for c in range(9)] for r in range(9)]
    + [[9 * r + c for r in range(9)] for c in range(9)]
    + [[9 * (r + i) + c + j for i in range(3) for j in range(3)] for r in (0, 3, 6) for c in (0, 3, 6)]
)
PEERS = [sorted({other for unit in UNITS if cell in unit for other in unit} - {cell}) for cell in range(81)]
"""The 20 cells that may not repeat a cell's digit."""

Grid = list[int]
"""81 cells; 0 is blank."""


def candidates_of(grid: Grid) -> list[int]:
    """For each blank cell the digits that no peer has, as bits; 0 for filled cells."""
    return [0 if digit else ALL & ~_taken(grid, cell) for cell, digit in enumerate(grid)]


def _taken(grid: Grid, cell: int) -> int:
    taken = 0
    for peer in PEERS[cell]:
        if grid[peer]:
            taken |= 1 << (grid[peer] - 1)
    return taken


def solve(grid: Grid, rng: random.Random | None = None) -> Grid | None:
    """A solution by search from the cell with the fewest candidates, or None; ``rng`` draws among several.

    The digits given must not repeat one another in a unit.
    """
    return _search(list(grid), candidates_of(grid), rng)


def _search(grid: Grid, candidates: list[int], rng: random.Random | None) -> Grid | None:
    best, fewest = -1, 10
    for cell, digit in enumerate(grid):
        if not digit:
            count = candidates[cell].bit_count()
            if count < fewest:
                best, fewest = cell, count
                if count <= 1:
                    break
    if best < 0:
        return grid
    digits = [d for d in range(1, 10) if candidates[best] >> (d - 1) & 1]
    if rng is not None:
        rng.shuffle(digits)
    for digit in digits:
        narrowed, bit = list(candidates), 1 << (digit - 1)
        for peer in PEERS[best]:
            narrowed[peer] &= ~bit
        grid[best] = digit
        if (found := _search(grid, narrowed, rng)) is not None:
            return found
    grid[best] = 0
    return None


def solve_by_singles(grid: Grid) -> Grid:
    """The grid filled as far as naked singles (one digit left for a cell) and hidden singles (one cell left) go."""
    grid, candidates = list(grid), candidates_of(grid)

    def fill(cell: int, bit: int) -> None:
        grid[cell] = bit.bit_length()
        candidates[cell] = 0
        for peer in PEERS[cell]:
            candidates[peer] &= ~bit

    progress = True
    while progress:
        progress = False
        for cell in range(81):
            bits = candidates[cell]
            if bits and not bits & (bits - 1):
                fill(cell, bits)
                progress = True
        for unit in UNITS:
            once = twice = 0
            for cell in unit:
                twice |= once & candidates[cell]
                once |= candidates[cell]
            once &= ~twice
            while once:
                bit = once & -once
                once ^= bit
                for cell in unit:
                    if candidates[cell] & bit:
                        fill(cell, bit)
                        progress = True
                        break
    return grid


def is_needed(puzzle: Grid, cell: int) -> bool:
    """Whether without that given digit the puzzle would have a second solution."""
    digit, puzzle[cell] = puzzle[cell], 0
    others = candidates_of(puzzle)[cell] & ~(1 << (digit - 1))
    needed = False
    for other in range(1, 10):
        if others >> (other - 1) & 1:
            puzzle[cell] = other
            if solve(puzzle) is not None:
                needed = True
                break
    puzzle[cell] = digit
    return needed


@functools.cache
def base_puzzle(kind: str, number: int) -> tuple[str, str]:
    """Base puzzle ``number`` of kind ``easy`` or ``hard`` and its only solution, as 81 digits each."""
    rng = random.Random(f"sudoku {kind} {number}")
    while True:
        solution = solve([0] * 81, rng)
        assert solution is not None
        puzzle, order = list(solution), rng.sample(range(81), 81)
        if kind == "easy":
            for cell in order[: 81 - rng.randint(34, 42)]:
                puzzle[cell] = 0
            accepted = 0 not in solve_by_singles(puzzle)
        else:
            for cell in order:
                if not is_needed(puzzle, cell):
                    puzzle[cell] = 0
            accepted = 0 in solve_by_singles(puzzle)
        if accepted:
            return "".join(map(str, puzzle)), "".join(map(str, solution))


def draw_symmetry(rng: random.Random) -> tuple[list[int], dict[int, int]]:
    """Which cell each comes from and which digit each becomes: bands and rows in them, columns, mirror, digits."""
    rows, columns = (
        [3 * band + line for band in rng.sample(range(3), 3) for line in rng.sample(range(3), 3)] for _ in range(2)
    )
    if rng.random() < 0.5:
        places = [9 * row + column for row in rows for column in columns]
    else:
        places = [9 * row + column for column in columns for row in rows]
    return places, str.maketrans("123456789", "".join(rng.sample("123456789", 9)))


def in_rows(cells: str) -> str:
    """Nine lines of nine digits."""
    return "\n".join(cells[i : i + 9] for i in range(0, 81, 9))


def draw(kind: str, bases: int, rng: random.Random) -> Problem:
    """A symmetric form of a base puzzle; its key is the base puzzle."""
    puzzle, solution = base_puzzle(kind, int(rng.random() * bases))
    places, digits = draw_symmetry(rng)
    shown, solved = ("".join([cells[place] for place in places]).translate(digits) for cells in (puzzle, solution))
    return Problem(puzzle, {"grid": in_rows(shown)}, in_rows(solved))


WORDINGS = ("Sudoku\n{grid}", "Solve this sudoku, 0 is blank.\n{grid}", "Fill the blanks:\n{grid}")
SHARES = {"direct": 0.9, "noisy": 0.05, "synth": 0.05}


@task("sudoku9_easy", chance=0.0, wordings=WORDINGS, conditions=SHARES, sentence="The solution is {answer}.")
def sudoku9_easy(rng: random.Random) -> Problem:
    """A grid of nine rows that singles alone fill."""
    return draw("easy", EASY_BASES, rng)


@task("sudoku9_hard", chance=0.0, wordings=WORDINGS, conditions=SHARES, sentence="The solution is {answer}.")
def sudoku9_hard(rng: random.Random) -> Problem:
    """A grid of nine rows with no digit to spare, for which singles do not suffice."""
    return draw("hard", HARD_BASES, rng)
