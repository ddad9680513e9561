from __future__ import annotations

import random

from hrm_text.data.procedural.maze import MOVES, ROOMS, SHORTEST, SIZE, WALL, carve, maze


def test_a_maze_is_a_spanning_tree_of_its_rooms() -> None:
    rng = random.Random(0)
    for _ in range(50):
        cells = carve(rng)
        # A tree over n rooms has n - 1 passages; the walk reached every room, so it is connected.
        assert sum(cell != WALL for cell in cells) == ROOMS**2 + ROOMS**2 - 1


def test_the_moves_lead_from_start_to_goal_through_no_wall_and_never_back() -> None:
    rng = random.Random(1)
    for _ in range(100):
        problem = maze(rng)
        cells = problem.key.replace("\n", "")
        here, visited = cells.index("S"), []
        for move in problem.answer.split():
            visited.append(here)
            here += MOVES[move]
            assert cells[here] != WALL
        assert here == cells.index("G")
        assert len(set(visited)) == len(visited) >= SHORTEST
        assert len(cells) == SIZE * SIZE
