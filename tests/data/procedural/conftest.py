from __future__ import annotations

import pytest

from hrm_text.data.procedural import sudoku9


@pytest.fixture(autouse=True)
def few_base_puzzles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few 9 x 9 base puzzles: a hard one takes 90 ms to make."""
    monkeypatch.setattr(sudoku9, "EASY_BASES", 20)
    monkeypatch.setattr(sudoku9, "HARD_BASES", 8)
