"""Your own data: a file of cleaners named on the command line, and ready readers of chats and of Alpaca's layout."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hrm_text.contracts import Example, UserError
from hrm_text.data.sources.upstream import DATASETS, Drop, Row, dataset

GROUP = "your own"
"""Of the ready readers: they are not part of ``all``."""

MOST_TURNS = 16
"""Answers of one conversation that become examples: each repeats what was said before it."""

_FILES = ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst", "**/*.json", "**/*.parquet")


def load_sources(paths: Sequence[Path]) -> None:
    """Run files of cleaners, each once in a process; what they register can be named from then on.

    Raises:
        UserError: a file is missing, fails, or registers no dataset.
    """
    for path in paths:
        module = load_module(path)
        if not any(found.clean.__module__ == module.__name__ for found in DATASETS.values()):
            raise UserError(
                f"{path}: registers no dataset; decorate a function with @dataset(...), see docs/sources.md"
            )


def load_module(path: Path) -> ModuleType:
    """The module in a file, loaded by its path, once in a process.

    Raises:
        UserError: the file is missing, or it fails while it runs.
    """
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a Python file")
    # The path is part of the name: two files of the same name are two modules.
    name = f"hrm_text_own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    before = dict(DATASETS)
    sys.modules[name] = module  # before it runs: dataclasses in it look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        DATASETS.clear()
        DATASETS.update(before)
        raise UserError(
            f"{path}{_line_of(error, path)}: could not be loaded: {type(error).__name__}: {error}"
        ) from error
    return module


def _line_of(error: Exception, path: Path) -> str:
    """Where in the file an error arose, as ``:12``."""
    line, traceback = None, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f":{line}" if line else ""


_SPEAKERS = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


@dataset(
    "chat",
    group=GROUP,
    licence="yours",
    home="any JSONL with messages (role, content) or conversations (from, value)",
    condition="the row's own key condition; direct without one",
    columns={"messages": "list or null", "conversations": "list or null", "condition": "string or null"},
    files=_FILES,
    hub=None,
    rows=0,
    megabytes=0,
)
def chat(row: Row) -> Iterator[Example | Drop]:
    """Conversations; every answer is an example.

    The instruction is all that was said before the answer. Before the first answer, that is the text of the system and
    the user, turns apart by an empty line; after it, every turn is preceded by ``User:`` or ``Assistant:``. An answer
    that opens the conversation has no instruction and is dropped.
    """
    turns = row["messages"] if row["messages"] is not None else row["conversations"]
    if turns is None:
        yield Drop("neither messages nor conversations")
        return
    system: list[str] = []
    said: list[tuple[str, str]] = []
    answers = 0
    for turn in turns:
        speaker, text = _SPEAKERS.get(turn.get("role", turn.get("from"))), _content(turn)
        if speaker is None or text is None:
            yield Drop("a turn of another role" if speaker is None else "a turn that is not text")
            return
        if speaker == "system":
            system.append(text)
            continue
        if speaker == "assistant":
            answers += 1
            if answers > MOST_TURNS:
                yield Drop(f"after {MOST_TURNS} answers")
                return
            yield Example(row["condition"] or "direct", _flattened(system, said), text)
        said.append((speaker, text))
    if not answers:
        yield Drop("no answer")


def _content(turn: Row) -> str | None:
    """The text of a turn, which may come in parts; None where it has something else in it."""
    content: Any = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        content = "\n".join(part["text"] for part in content)
    return content if isinstance(content, str) else None


def _flattened(system: Sequence[str], said: Sequence[tuple[str, str]]) -> str:
    if not said:
        return ""  # a system message alone asks nothing
    if any(speaker == "assistant" for speaker, _ in said):
        return "\n\n".join([*system, *(f"{speaker.capitalize()}: {text}" for speaker, text in said)])
    return "\n\n".join([*system, *(text for _, text in said)])


@dataset(
    "alpaca",
    group=GROUP,
    licence="yours",
    home="any JSON or JSONL with instruction, input, output",
    condition="the row's own key condition; direct without one",
    columns={
        "instruction": "string", "input": "string or null", "output": "string", "condition": "string or null",
    },
    files=_FILES,
    hub=None,
    rows=0,
    megabytes=0,
)  # fmt: skip
def alpaca(row: Row) -> Iterator[Example | Drop]:
    """Instructions with an input that may be empty: it follows after an empty line."""
    asked = [part for part in (row["instruction"], row["input"]) if part and part.strip()]
    yield Example(row["condition"] or "direct", "\n\n".join(asked), row["output"])
