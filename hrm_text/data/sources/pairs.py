"""From the cells of a public row to an example: what the cleaners share. Nothing here raises, whatever a row holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hrm_text.contracts import Example
from hrm_text.data.sources.upstream import Drop, Row

_PROOF = re.compile(r"\b(?:prove|proof|show that)\b", re.IGNORECASE)


def text(row: Row, key: str) -> str:
    """The text of a column without the white space around it; empty where there is none."""
    value = row.get(key)
    return value.strip() if isinstance(value, str) else ""


def pair(condition: str, question: str, answer: str) -> Example | Drop:
    """An example, unless one of its halves is empty."""
    if not question:
        return Drop("no question")
    if not answer:
        return Drop("no answer")
    return Example(condition, question, answer)


def asks_for_proof(question: str) -> bool:
    """Whether a question wants an argument, so that a bare answer says nothing."""
    return _PROOF.search(question) is not None


def boxed(solution: str) -> str:
    r"""The content of the last ``\boxed{...}`` of a solution, braces balanced; empty where there is none."""
    start = solution.rfind(r"\boxed{")
    if start < 0:
        return ""
    start += len(r"\boxed{")
    depth = 1
    for end in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if not depth:
            return solution[start:end].strip()
    return ""


def exchanges(row: Row, key: str, *, speaker: str, says: str) -> Iterator[tuple[str, str]]:
    """The turns of a conversation, in order, as (who, what); a turn that is malformed ends it.

    Args:
        row: the row.
        key: its column that holds the list of turns.
        speaker: key of a turn: who speaks.
        says: key of a turn: what is said.
    """
    turns: Any = row.get(key)
    for turn in turns if isinstance(turns, list) else ():
        who, what = (turn.get(speaker), turn.get(says)) if isinstance(turn, dict) else (None, None)
        if not isinstance(who, str) or not isinstance(what, str):
            return
        yield who, what.strip()
