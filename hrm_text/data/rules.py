"""Rules: how much of each source file goes into an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hrm_text.contracts import UserError
from hrm_text.settings import from_mapping, read_yaml, settings


@settings
class Rule:
    """How much to draw of the source files whose name starts with ``prefix``."""

    prefix: str
    """Start of the folder's name in the store, such as ``flan__``; the empty prefix matches every file."""
    max_per_file: Annotated[int, Field(ge=0)] | None = None
    """Most rows per epoch, before ``repeat``; no limit by default, and 0 leaves the file out."""
    max_total: Annotated[int, Field(ge=0)] | None = None
    """Most rows per epoch of all files of the rule together, before ``repeat``; each file then gives the same part of
    what it would have given."""
    repeat: Annotated[int, Field(ge=1)] = 1
    """How many times the rows go into an epoch."""
    long_context: Literal["truncate", "drop"] = "truncate"
    """A row longer than the context: cut its response, or leave the row out."""


def read_rules(path: Path) -> list[Rule]:
    """The rules of a YAML file, a list of mappings with the keys of ``Rule``.

    Raises:
        UserError: the file is missing, is not such a list, or has an unknown key or a value out of range.
    """
    values = read_yaml(path)
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of rules, each with a prefix, found {type(values).__name__}")
    return [from_mapping(Rule, value, f"{path}: rule {number}") for number, value in enumerate(values, start=1)]


def rule_for(name: str, rules: Sequence[Rule]) -> Rule:
    """The first rule whose prefix matches; without one, a file goes in whole, once."""
    return next((rule for rule in rules if name.startswith(rule.prefix)), Rule(prefix=""))


def rows_per_epoch(rules: Sequence[Rule], usable: Sequence[int]) -> list[int]:
    """How many rows each file gives to an epoch, repeats included.

    Args:
        rules: the rule of each file; files of one rule hold the same object.
        usable: the rows of each file that are fit for use.
    """
    wanted = [
        rows if rule.max_per_file is None else min(rule.max_per_file, rows)
        for rule, rows in zip(rules, usable, strict=True)
    ]
    for rule in {id(rule): rule for rule in rules if rule.max_total is not None}.values():
        files = [number for number, of_file in enumerate(rules) if of_file is rule]
        assert rule.max_total is not None
        for number, share in zip(files, shares([wanted[file] for file in files], rule.max_total), strict=True):
            wanted[number] = share
    return [rows * rule.repeat for rows, rule in zip(wanted, rules, strict=True)]


def shares(wanted: Sequence[int], most: int) -> list[int]:
    """Scale whole numbers down so that they add up to ``most``, if they add up to more.

    Largest remainders: each is rounded down, and those that lost most get one more, the earlier ones first.
    """
    total = sum(wanted)
    if total <= most:
        return list(wanted)
    rounded = [number * most // total for number in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda file: (-(wanted[file] * most % total), file))
    for file in by_remainder[: most - sum(rounded)]:
        rounded[file] += 1
    return rounded
