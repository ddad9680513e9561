from __future__ import annotations

import random

import pytest

from hrm_text.data.procedural.sudoku9 import (
    PEERS,
    UNITS,
    base_puzzle,
    draw_symmetry,
    is_needed,
    solve,
    solve_by_singles,
    sudoku9_easy,
    sudoku9_hard,
)


def is_solution(grid: list[int], puzzle: list[int]) -> bool:
    agrees = all(given in (0, digit) for given, digit in zip(puzzle, grid, strict=True))
    return agrees and all({grid[cell] for cell in unit} == set(range(1, 10)) for unit in UNITS)


def digits(text: str) -> list[int]:
    return [int(digit) for digit in text if digit.isdigit()]


def test_a_cell_has_twenty_peers() -> None:
    assert {len(peers) for peers in PEERS} == {20}


@pytest.mark.parametrize("number", range(4))
def test_easy_puzzles_are_solved_by_singles_alone(number: int) -> None:
    puzzle, solution = map(digits, base_puzzle("easy", number))
    assert solve_by_singles(puzzle) == solution
    assert is_solution(solution, puzzle)


@pytest.mark.parametrize("number", range(4))
def test_hard_puzzles_need_every_digit_and_more_than_singles(number: int) -> None:
    puzzle, solution = map(digits, base_puzzle("hard", number))
    assert 0 in solve_by_singles(puzzle)
    assert solve(puzzle) == solution
    assert is_solution(solution, puzzle)
    assert all(is_needed(puzzle, cell) for cell in range(81) if puzzle[cell])
    # One solution only: whichever order the search takes, it finds the same.
    assert all(solve(puzzle, random.Random(seed)) == solution for seed in range(5))


def test_an_impossible_grid_has_no_solution() -> None:
    # The last cell of the first row sees eight digits in its row and the ninth in its column.
    assert solve([1, 2, 3, 4, 5, 6, 7, 8, 0] + [0] * 8 + [9] + [0] * 63) is None


@pytest.mark.parametrize("draw", [sudoku9_easy, sudoku9_hard])
def test_every_symmetric_form_is_a_sudoku_of_its_own_with_the_key_of_its_base(draw: object) -> None:
    rng, forms = random.Random(0), set()
    for _ in range(40):
        problem = draw(rng)  # type: ignore[operator]
        assert is_solution(digits(problem.answer), digits(problem.fields["grid"]))
        assert problem.key.count("0") == problem.fields["grid"].count("0")
        forms.add(problem.fields["grid"])
    assert len(forms) == 40


def test_symmetries_permute_cells() -> None:
    rng = random.Random(1)
    assert all(sorted(draw_symmetry(rng)[0]) == list(range(81)) for _ in range(50))
