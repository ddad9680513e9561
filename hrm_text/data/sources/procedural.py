"""Our own tasks over wider ranges, as files of the GPU mixture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hrm_text.data.procedural import CPU_WEIGHTS
from hrm_text.data.procedural.mixture import draw_examples
from hrm_text.data.sources.registry import Keyed, source

WEIGHTS: dict[str, Mapping[str, float]] = {
    "short": {name: weight for name, weight in CPU_WEIGHTS.items() if name != "sudoku4"},
    "arithmetic": {"long_add": 4, "long_sub": 4, "multiply": 3, "divide": 3, "sum_list": 2},
    "numbers": {
        "long_compare": 2,
        "sort_numbers": 2,
        "sequence": 3,
        "from_roman": 1,
        "spell_number": 2,
        "read_number": 2,
        "weekday": 1,
        "later": 2,
    },
    "strings": {
        "long_reverse": 3,
        "long_count_letter": 2,
        "nth_letter": 2,
        "replace": 2,
        "palindrome": 1,
        "sort_words": 2,
        "initials": 1,
        "vowels_first": 1,
        "in_both": 2,
    },
    "reading": {"reading": 4, "who": 2, "where": 2},
    "yes_no": {"yes_no": 1},
    "choice": {"choice": 2, "odd_one_out": 1},
    "word_problems": {"word_problem": 1},
    "sudoku_4x4": {"sudoku4": 1},
    "sudoku_9x9_easy": {"sudoku9_easy": 1},
    "sudoku_9x9_hard": {"sudoku9_hard": 1},
    "maze_11x11": {"maze": 1},
}
"""Of each file the tasks and their relative frequency."""

FILES = {
    "short": 60_000,
    "arithmetic": 90_000,
    "numbers": 50_000,
    "strings": 50_000,
    "reading": 40_000,
    "yes_no": 20_000,
    "choice": 20_000,
    "word_problems": 40_000,
    "sudoku_4x4": 50_000,
    "sudoku_9x9_easy": 60_000,
    "sudoku_9x9_hard": 40_000,
    "maze_11x11": 40_000,
}


@source(
    "procedural",
    licence="Apache-2.0",
    home="hrm_text.data.procedural",
    condition="direct, cot, noisy and synth, composed",
    files=FILES,
)
def generate(file: str, seed: int) -> Iterator[Keyed]:
    """Our own generators: arithmetic, numbers, strings, reading, choices, word problems, sudoku, mazes."""
    for task, problem, example in draw_examples(WEIGHTS[file], seed):
        yield Keyed(task.name, problem.key, example, problem.answer)
