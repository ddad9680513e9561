from __future__ import annotations

import random

from hrm_text.data.procedural.sudoku4 import BLANK, grids, has_one_solution, sudoku4


def test_there_are_288_grids() -> None:
    assert len(set(grids())) == 288


def test_a_puzzle_has_the_one_solution_that_agrees_with_it() -> None:
    rng = random.Random(0)
    for _ in range(200):
        problem = sudoku4(rng)
        cells, answer = problem.key.replace(" ", ""), problem.answer.replace(" ", "")
        fits = [grid for grid in grids() if all(c in (BLANK, d) for c, d in zip(cells, grid, strict=True))]
        assert fits == [answer]


def test_a_grid_with_too_few_digits_is_turned_down() -> None:
    assert not has_one_solution([BLANK] * 16)
    assert not has_one_solution(list("12" + BLANK * 14))
