"""The tasks of reasoning-gym (Stojanovski et al. 2025) by name and level: ``reasoning_gym/gcd/2``.

``reasoning_gym`` alone is the mean over the tasks of the mixture ``gpu-preset`` at the lowest level. Items are drawn
here, from the side of the split by problem that no mixture trains on: seeds make no split, as near ones draw the same
items. A level is that of every attribute of a task's curriculum.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from hrm_text.contracts import UserError
from hrm_text.data.procedural.split import is_held_out
from hrm_text.data.sources.reasoning_gym import TASKS as TRAINED
from hrm_text.data.sources.reasoning_gym import by_text, dataset
from hrm_text.eval.scoring.boxed import last_boxed
from hrm_text.eval.task import Question, Rows, Scored, Task

NAMES = (
    "ab advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic binary_alternation bitwise_arithmetic "
    "caesar_cipher calendar_arithmetic chain_sum circuit_logic coin_flip color_cube_rotation complex_arithmetic "
    "count_bits count_primes course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery "
    "family_relationships figlet_font fraction_simplification gcd group_anagrams isomorphic_strings kakurasu "
    "knights_knaves largest_island lcm leg_counting letter_counting letter_jumble mahjong_puzzle manipulate_matrix "
    "maze mini_sudoku modulo_grid needle_haystack number_filtering number_format number_sorting palindrome_generation "
    "palindrome_partitioning path_star polynomial_equations power_function prime_factorization products quantum_lock "
    "ransom_note rearc rectangle_count rotate_matrix rotten_oranges self_reference sentence_reordering shortest_path "
    "simple_equations simple_geometry spell_backward string_manipulation string_splitting string_synthesis sudoku "
    "survo syllogism time_intervals tower_of_hanoi word_sequence_reversal word_sorting zebra_puzzles"
).split()
"""Left out: tasks whose scorer executes the response (binary_matrix, countdown, intermediate_integration, n_queens,
polynomial_multiplication, puzzle24, simple_integration, spiral_matrix, string_insertion) or whose items execute code
(codeio); those without a stored answer, of which no test can show that a right one counts (boxnet, graph_color,
propositional_logic, rubiks_cube, rush_hour); one whose scorer takes anything for right (game_of_life_halting); those
that draw less than an item a second (bf, futoshiki, game_of_life, jugs, number_sequence, sokoban), fail when they draw
(tsumego) or at every level (knight_swap, pool_matrix, word_ladder); and those without levels (acre, composite,
gsm_symbolic, list_functions)."""

LEVELS = (0, 1, 2, 3)
ITEMS = 200
"""Of one task."""
ITEMS_EACH = 50
"""Where several tasks are one."""
SEED = 1
PATIENCE = 100
"""Draws for each item that is wanted: one in ten is held out, and small tasks repeat themselves."""


@functools.cache
def _drawn(name: str, level: int) -> Any:
    try:
        return dataset(name, level, SEED)
    except ImportError:
        raise UserError(
            "the tasks of reasoning-gym need something that is not installed: pip install 'hrm-text[gpu-preset]'"
        ) from None
    except AssertionError as error:
        raise UserError(f"reasoning_gym/{name}/{level}: there is no such level ({error}); use a lower one") from None


def held_out(name: str, level: int, wanted: int, subject: str = "") -> Iterator[Question]:
    """Different problems of one task that no mixture trains on, fewer than wanted where it has fewer."""
    items, seen = _drawn(name, level), set[str]()
    for number in range(wanted * PATIENCE):
        entry = items[number]
        asked, answer = entry["question"].strip(), entry["answer"]
        key = TRAINED.get(name, by_text)(asked, str(answer).strip())
        if key not in seen and is_held_out(f"reasoning_gym/{name}", key):
            seen.add(key)
            yield Question(f"{name}/{level}/{number}", asked, answer, subject=subject)
        if len(seen) == wanted:
            return


def score(response: str, question: Question) -> Scored:
    """1 where the task's own scorer gives all of its points; where it gives a part, or fails, 0.

    Of a response with a box its content counts.
    """
    name, level, number = question.id.split("/")
    boxed = last_boxed(response)
    got = (response if boxed is None else boxed).strip()
    items = _drawn(name, int(level))
    try:
        right = float(bool(got) and items.score_answer(got, items[int(number)]) == 1.0)
    except Exception:  # of whatever kind: scorers read numbers and grids of responses that hold none
        right = 0.0
    return Scored(right, right, got, readable=bool(got))


def _task(name: str, level: int) -> Task:
    def questions(rows: Rows) -> Iterator[Question]:
        return held_out(name, level, ITEMS)

    called = f"reasoning_gym/{name}/{level}"
    title = f"reasoning-gym: {name}, level {level}"
    return Task(called, 1, title, (), questions, score, condition="direct", max_new_tokens=512)


def _mixture(rows: Rows) -> Iterator[Question]:
    for name in TRAINED:
        yield from held_out(name, 0, ITEMS_EACH, subject=name)


TASKS = (
    Task(
        name="reasoning_gym",
        version=1,
        title="reasoning-gym: the mixture's tasks, level 0",
        datasets=(),
        questions=_mixture,
        score=score,
        condition="direct",
        max_new_tokens=512,
        macro=True,
        held_in=("reasoning_gym",),
    ),
    *(_task(name, level) for name in NAMES for level in LEVELS),
)
