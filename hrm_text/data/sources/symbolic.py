"""Symbolic problems: DeepMind Mathematics (Saxton et al. 2019), AMPS (Hendrycks et al. 2021), Sudoku-Extreme."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hrm_text.contracts import Example
from hrm_text.data.sources.pairs import pair, text
from hrm_text.data.sources.upstream import Drop, Hub, Row, dataset

AMPS = "https://github.com/hendrycks/math"
QUESTION_AND_ANSWER = {"question": "string", "answer": "string"}

_PUZZLE, _SOLVED = re.compile(r"[.0-9]{81}"), re.compile(r"[1-9]{81}")


@dataset(
    "dm_mathematics",
    group="symbolic",
    licence="Apache-2.0",
    home="https://github.com/google-deepmind/mathematics_dataset",
    condition="direct",
    columns=QUESTION_AND_ANSWER,
    files=("**/train-easy/*.txt", "**/train-medium/*.txt", "**/train-hard/*.txt"),
    hub=None,
    rows=111_999_888,
    megabytes=2_330,
    text="alternating",
)
def clean_dm_mathematics(row: Row) -> Iterator[Example | Drop]:
    """DeepMind Mathematics: school problems of 56 modules at three levels; a file, so a stratum, for each."""
    yield pair("direct", text(row, "question"), text(row, "answer"))


@dataset(
    "amps_mathematica",
    group="symbolic",
    licence="MIT",
    home=AMPS,
    condition="direct",
    columns=QUESTION_AND_ANSWER,
    files=("**/mathematica/*/*/*.txt",),
    hub=None,
    rows=4_830_500,
    megabytes=600,
    text="problem_answer",
    one_row_per_file=True,
)
def clean_amps_mathematica(row: Row) -> Iterator[Example | Drop]:
    """AMPS: exercises that Mathematica made and solved; a folder, so a stratum, for each task."""
    yield pair("direct", text(row, "question"), text(row, "answer"))


@dataset(
    "amps_khan",
    group="symbolic",
    licence="MIT",
    home=AMPS,
    condition="cot,noisy",
    columns={"problem": "string", "hints": "list"},
    files=("**/khan/*/*.json",),
    hub=None,
    rows=103_059,
    megabytes=100,
    one_row_per_file=True,
)
def clean_amps_khan(row: Row) -> Iterator[Example | Drop]:
    """AMPS: exercises of Khan Academy; the hints, line by line, are the solution."""
    hints = row.get("hints")
    lines = [hint.strip() for hint in hints if isinstance(hint, str)] if isinstance(hints, list) else []
    yield pair("cot,noisy", text(row, "problem"), "\n".join(filter(None, lines)))


@dataset(
    "sudoku_extreme",
    group="symbolic",
    licence="not stated",
    home="https://huggingface.co/datasets/sapientinc/sudoku-extreme",
    condition="direct",
    columns={"question": "string", "answer": "string"},
    files=("**/train.csv",),
    hub=Hub("sapientinc/sudoku-extreme"),
    rows=3_831_994,
    megabytes=720,
)
def clean_sudoku_extreme(row: Row) -> Iterator[Example | Drop]:
    """Sudoku-Extreme: puzzles with one solution each, easy to very hard; row by row, 0 for an empty cell."""
    puzzle, solved = text(row, "question").replace(".", "0"), text(row, "answer")
    if not _PUZZLE.fullmatch(puzzle) or not _SOLVED.fullmatch(solved):
        yield Drop("not 81 cells")
    elif any(given not in ("0", cell) for given, cell in zip(puzzle, solved, strict=True)):
        yield Drop("the solution does not fit the puzzle")
    else:
        yield pair("direct", f"Fill in this Sudoku, written row by row with 0 for an empty cell.\n\n{puzzle}", solved)
