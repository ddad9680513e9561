"""The responses that the report of an evaluation shows: chosen, cut and counted within stated bounds.

A run may hold hundreds of megabytes; a page that a browser opens at once and a colleague gets by mail may not. What is
left out is counted, and lies whole in ``answers.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hrm_text.contracts import UserError
from hrm_text.data.inspect import visible
from hrm_text.recipes.pages import inline_json

WRONG, RIGHT = 200, 50
"""Most responses of a task under a condition that are shown."""
CHARACTERS = 4000
"""Most of a prompt, a gold answer or a response: a third from its beginning, the rest from its end, where the question
and the answer are."""
PAGE_BYTES = 8 << 20
"""Most that all of them take in the page, in equal parts for all tasks and conditions."""

KINDS = {
    "wrong": "wrong",
    "partly": "partly right",
    "unreadable": "unreadable",
    "no room": "not asked, no room",
    "truncated": "cut",
    "right": "right",
}
"""What may be said of a response, in words: see ``kinds_of``."""

Line = Mapping[str, Any]
"""One line of ``answers.jsonl``, ``questions.jsonl`` or the like."""


@dataclass(frozen=True, slots=True)
class Response:
    """One response with what was asked; all texts are cut and ``visible``."""

    group: int
    """Number of its task and condition in ``results.json``."""
    id: str
    sample: int
    subject: str
    prompt: str
    expected: str
    got: str
    """What was read out of the response; empty if nothing was."""
    text: str
    num_tokens: int
    finish: str
    strict: float
    published: float
    kinds: tuple[str, ...]
    """See ``kinds_of``."""
    other: Mapping[str, Any] | None
    """Of the model compared with, where there is one: strict, got, text."""


@dataclass(slots=True)
class Group:
    """The responses of a task under a condition."""

    total: Counter[str] = field(default_factory=Counter)
    """Of all of them, by kind."""
    responses: list[Response] = field(default_factory=list)
    """Those that are shown, in the order of the run."""

    @property
    def num_responses(self) -> int:
        """How many there are in all."""
        return self.not_right + self.total["right"]

    @property
    def not_right(self) -> int:
        """How many of all are not right."""
        return sum(self.total[kind] for kind in ("partly", "wrong", "unreadable", "no room"))


def kinds_of(line: Line, longest: int) -> tuple[str, ...]:
    """What became of a response: right, partly (right), wrong (but read), unreadable, or no room (not asked).

    And, besides, truncated: cut at the most tokens or the end of the context. A letter is one token and never cut.
    """
    if line["strict"] >= 1:
        kind = "right"
    elif line["finish_reason"] == "no room":
        kind = "no room"
    elif not line["readable"]:
        kind = "unreadable"
    else:
        kind = "partly" if line["strict"] > 0 else "wrong"
    return (kind, "truncated") if line["finish_reason"] == "length" and longest > 1 else (kind,)


def read_responses(folder: Path, results: Line, against: Path | None = None) -> list[Group]:
    """Choose what to show of a finished run.

    Which ones is decided by the questions' ids alone, so that two runs show the same questions where both are wrong.

    Args:
        folder: of the run.
        results: its ``results.json``.
        against: folder of the run it is compared with.

    Returns:
        One for each of the scores, in their order.

    Raises:
        UserError: a file is missing or damaged, or holds a task that the results do not.
    """
    names = [(score["task"], score["condition"]) for score in results["scores"]]
    longest = [results["tasks"][f"{task} under {condition}"]["max_new_tokens"] for task, condition in names]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [Group() for _ in names]
    chosen: list[dict[bool, _Smallest]] = [{True: _Smallest(RIGHT), False: _Smallest(WRONG)} for _ in names]
    path = folder / "answers.jsonl"
    for place, line in read_lines(path, ("task", "condition", "id", "sample", "strict", "readable", "finish_reason")):
        number = numbers.get((line["task"], line["condition"]))
        if number is None:
            raise UserError(f"{path}:{place}: results.json has no {line['task']} under {line['condition']}")
        kinds = kinds_of(line, longest[number])
        groups[number].total.update(kinds)
        chosen[number]["right" in kinds].add(place, line)
    wanted = {_key(line) for both in chosen for some in both.values() for _, line in some.lines()}
    asked = _by_key(folder / "questions.jsonl", wanted, samples=False)
    others = {} if against is None else _by_key(against / "answers.jsonl", wanted, samples=True)
    for number, group in enumerate(groups):
        placed: list[tuple[int, Response]] = []
        used, room = 0, PAGE_BYTES // len(groups)
        for right, share in ((False, room * 4 // 5), (True, room)):  # what is wrong never gives way to what is right
            for place, line in chosen[number][right].lines():
                question, other = asked.get(_key(line)[:3], {}), others.get(_key(line))
                response = _response(number, line, question, other, kinds_of(line, longest[number]))
                size = len(inline_json(asdict(response)).encode())
                if used + size <= share:
                    placed.append((place, response))
                    used += size
        group.responses = [response for _, response in sorted(placed, key=lambda each: each[0])]
    return groups


class _Smallest:
    """The lines that come first by a checksum of their question: an even choice, and the same in every run."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines: list[tuple[bytes, int, Line]] = []

    def add(self, place: int, line: Line) -> None:
        """Take a line, or not."""
        digest = hashlib.sha256(json.dumps([line["id"], line["sample"]]).encode()).digest()
        self._lines.append((digest, place, line))
        if len(self._lines) >= 2 * self._most:
            self._keep()

    def lines(self) -> list[tuple[int, Line]]:
        """Those kept, with their places in the file; the most preferred first."""
        self._keep()
        return [(place, line) for _, place, line in self._lines]

    def _keep(self) -> None:
        self._lines.sort(key=lambda each: each[:2])
        del self._lines[self._most :]


def _response(group: int, line: Line, question: Line, other: Line | None, kinds: tuple[str, ...]) -> Response:
    return Response(
        group=group,
        id=_shown(line["id"]),
        sample=line["sample"],
        subject=_shown(line.get("subject", "")),
        prompt=_shown(question.get("prompt", "")),
        expected=_shown(question.get("answer", "")),
        got=_shown(line["got"]),
        text=_shown(line["text"]),
        num_tokens=line["num_tokens"],
        finish=_shown(line["finish_reason"]),
        strict=line["strict"],
        published=line["published"],
        kinds=kinds,
        other=other and {"strict": other["strict"], "got": _shown(other["got"]), "text": _shown(other["text"])},
    )


def _shown(value: Any) -> str:
    """A text or other JSON as the page shows it."""
    return visible(cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), CHARACTERS))


def cut(text: str, most: int) -> str:
    """At most so many characters of a text, from both of its ends, with a line that says how many are missing."""
    if len(text) <= most:
        return text
    head = most // 3
    return f"{text[:head]}\n[… {len(text) - most:,} characters left out …]\n{text[len(text) - (most - head) :]}"


_Key = tuple[str, str, str, int]


def _key(line: Line) -> _Key:
    return line["task"], line["condition"], line["id"], line["sample"]


def _by_key(path: Path, wanted: Collection[_Key], *, samples: bool) -> dict[tuple[Any, ...], Line]:
    """The lines of those keys; without ``samples`` of a question, whichever response it is to."""
    names = ("task", "condition", "id", "sample")[: 4 if samples else 3]
    keys = {key[: len(names)] for key in wanted}
    return {key: line for _, line in read_lines(path, names) if (key := tuple(line[name] for name in names)) in keys}


def read_lines(path: Path, names: Collection[str]) -> Iterator[tuple[int, Line]]:
    """The lines of a file of a run with their numbers, read one by one: it may be larger than the memory.

    Raises:
        UserError: there is no such file; or a line is damaged, or lacks one of ``names``.
    """
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                line = json.loads(text)
                if missing := [name for name in names if name not in line]:
                    raise ValueError(f"no {', '.join(missing)}")
                yield number, line
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the evaluation to its end first") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}:{number}: damaged ({error}); run the same evaluation again") from None
