"""Mazes of 11 by 11 cells: five by five rooms joined by a random spanning tree, so that one path leads to the goal."""

from __future__ import annotations

import random

from hrm_text.data.procedural.registry import Problem, task

ROOMS = 5
SIZE = 2 * ROOMS + 1
WALL, OPEN = "1", "0"
"""Digits, so that a tokenizer makes one token of every cell: runs of ``#`` merge."""
MOVES = {"U": -SIZE, "D": SIZE, "L": -1, "R": 1}
SHORTEST = 6
"""Cells between start and goal; nearer goals are drawn again."""


def carve(rng: random.Random) -> list[str]:
    """A maze as SIZE * SIZE cells: rooms at odd places, joined by a depth-first walk that never meets itself."""
    cells = [WALL] * (SIZE * SIZE)
    walk = [SIZE * (2 * rng.randrange(ROOMS) + 1) + 2 * rng.randrange(ROOMS) + 1]
    cells[walk[0]] = OPEN
    while walk:
        here = walk[-1]
        row, column = divmod(here, SIZE)
        onward = [
            step
            for step, inside in ((-SIZE, row > 1), (SIZE, row < SIZE - 2), (-1, column > 1), (1, column < SIZE - 2))
            if inside and cells[here + 2 * step] == WALL
        ]
        if onward:
            step = onward[int(rng.random() * len(onward))]
            cells[here + step] = cells[here + 2 * step] = OPEN
            walk.append(here + 2 * step)
        else:
            walk.pop()
    return cells


def find_path(cells: list[str], start: int, goal: int) -> str:
    """The moves of the only path from one cell to another, as letters of MOVES."""
    paths = {start: ""}
    queue = [start]
    for here in queue:
        if here == goal:
            break
        for letter, step in MOVES.items():
            if cells[here + step] != WALL and here + step not in paths:
                paths[here + step] = paths[here] + letter
                queue.append(here + step)
    return paths[goal]


@task(
    "maze",
    chance=0.0,
    wordings=(
        "Maze, 1 is wall. Go from S to G.\n{maze}",
        "Find the path from S to G.\n{maze}",
        "{maze}\nWhich moves lead from S to G?",
    ),
    conditions={"direct": 0.9, "noisy": 0.05, "synth": 0.05},
    sentence="The path is {answer}.",
)
def maze(rng: random.Random) -> Problem:
    """The moves up, down, left and right from the start to the goal of an 11 by 11 maze."""
    cells = carve(rng)
    while True:
        start, goal = (SIZE * (2 * rng.randrange(ROOMS) + 1) + 2 * rng.randrange(ROOMS) + 1 for _ in range(2))
        path = find_path(cells, start, goal)
        if len(path) >= SHORTEST:
            break
    cells[start], cells[goal] = "S", "G"
    shown = "\n".join("".join(cells[i : i + SIZE]) for i in range(0, SIZE * SIZE, SIZE))
    return Problem(shown, {"maze": shown}, " ".join(path))
