"""Every public dataset turns rows of its upstream schema into exactly these examples and drops (upstream/*.yaml)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.contracts import CONDITIONS, Example
from hrm_text.data.prompt import parse_condition
from hrm_text.data.sources import flan, general, knowledge, mathematics, reasoning, symbolic, web
from hrm_text.data.sources.pairs import asks_for_proof, boxed
from hrm_text.data.sources.reasoning import solution
from hrm_text.data.sources.upstream import DATASETS, Drop
from hrm_text.data.sources.upstream_files import select_columns

MODULES = (flan, general, knowledge, mathematics, symbolic, reasoning, web)
REGISTERED = {
    name: found
    for name, found in DATASETS.items()
    if found.clean.__module__ in {module.__name__ for module in MODULES}  # others register theirs in tests
}


def fixture_file(module: str) -> Path:
    return Path(__file__).parent / "upstream" / f"{module.rpartition('.')[2]}.yaml"


FIXTURES: dict[str, list[dict[str, Any]]] = {
    name: rows for module in MODULES for name, rows in yaml.safe_load(fixture_file(module.__name__).read_text()).items()
}
GROUPS = {
    "general instruction", "rewritten knowledge", "mathematics", "symbolic", "reasoning", "textbook, web",
}  # fmt: skip
ODD: tuple[Any, ...] = (
    None,
    "",
    " \n",
    5,
    0.5,
    True,
    [],
    {},
    [None],
    [[]],
    [{}],
    ["a"],
    {"text": 3},
    "<think>",
    "\x00",
)


class Watched(dict[str, Any]):
    """A row that remembers which of its columns were read."""

    read: set[str]

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def plain(item: Example | Drop) -> list[str] | str:
    return item.reason if isinstance(item, Drop) else [item.condition, item.instruction, item.response]


def spoilt(name: str) -> Iterator[dict[str, Any]]:
    """Each row of a fixture with one column replaced by something odd, or missing."""
    for fixture, column in itertools.product(FIXTURES[name], REGISTERED[name].columns):
        row = fixture["row"]
        yield {key: value for key, value in row.items() if key != column}
        yield from ({**row, column: odd} for odd in ODD)


def test_there_is_a_fixture_for_every_dataset_and_none_besides() -> None:
    assert set(REGISTERED) == set(FIXTURES)
    assert len(REGISTERED) == 38


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_rows_become_these_examples_and_these_drops(name: str) -> None:
    for fixture in FIXTURES[name]:
        assert [plain(item) for item in REGISTERED[name].clean(fixture["row"])] == fixture["gives"]


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_what_is_registered_is_what_the_cleaner_reads_and_what_the_rows_hold(name: str) -> None:
    found = REGISTERED[name]
    read: set[str] = set()
    for fixture in FIXTURES[name]:
        row = Watched(fixture["row"])
        row.read = read
        list(found.clean(row))
        if found.stratum is not None:
            assert found.stratum(row) == fixture["stratum"]
        assert isinstance(select_columns(fixture["row"], found.columns), dict)
        assert set(found.columns) <= set(fixture["row"])
    assert read == set(found.columns)


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_a_dataset_says_where_it_is_from_and_what_it_is(name: str) -> None:
    found = REGISTERED[name]
    assert found.group in GROUPS
    assert found.licence
    assert found.description
    assert found.condition
    assert urlsplit(found.home).scheme == "https"
    assert urlsplit(found.home).netloc in ("huggingface.co", "github.com")
    assert found.rows > 0
    assert found.megabytes > 0
    assert found.files
    # The order in which tags are emitted is theirs, so the rule in words names them as the examples have them.
    given_tags = {item[0] for fixture in FIXTURES[name] for item in fixture["gives"] if isinstance(item, list)}
    assert given_tags
    for tags in given_tags:
        assert set(parse_condition(tags)) <= set(CONDITIONS)
        assert tags in found.condition
    assert not any("test" in pattern for pattern in found.files) or name == "omnimath"


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_an_odd_row_is_dropped_with_a_fixed_reason_and_never_an_exception(name: str) -> None:
    reasons: set[str] = set()
    for row in spoilt(name):
        items = list(REGISTERED[name].clean(row))
        assert items
        for item in items:
            if isinstance(item, Example):
                assert item.instruction.strip()
                assert item.response.strip()
                parse_condition(item.condition)
            else:
                reasons.add(item.reason)
        stratum = REGISTERED[name].stratum
        assert stratum is None or stratum(row)
    assert 1 <= len(reasons) <= 8


@given(st.text(alphabet="ab{}\\ "), st.integers(0, 5), st.text(alphabet="ab "))
def test_the_last_box_is_found_and_its_braces_balance(before: str, depth: int, content: str) -> None:
    inside = "{" * depth + content.strip() + "}" * depth
    assert boxed(before + r"\boxed{" + inside + "} after") == inside
    assert boxed(r"\boxed{" + "{" * depth + content) == ""


@given(st.text(max_size=30).filter(lambda text: "<" not in text), st.text(min_size=1, alphabet="abc", max_size=9))
def test_a_solution_is_what_follows_the_thinking(thought: str, answer: str) -> None:
    assert solution(f"<think>{thought}</think>{answer}") == answer
    assert solution(f"{thought}</think>\n{answer}\n") == answer
    assert solution(f"<think>{thought}") == ""
    marked = f"<|begin_of_thought|>{thought}<|end_of_thought|> <|begin_of_solution|>{answer}<|end_of_solution|>"
    assert solution(marked) == answer
    assert solution(marked.removesuffix("<|end_of_solution|>")) == answer


@pytest.mark.parametrize(
    ("question", "wants"),
    [("Prove it.", True), ("Show that x.", True), ("Give a proof", True), ("Improve it.", False), ("Show x.", False)],
)
def test_proofs_are_told_by_whole_words(question: str, wants: bool) -> None:
    assert asks_for_proof(question) is wants
