"""Settings: frozen dataclasses, read strictly from YAML.

A room declares its settings with ``@settings`` and reads them in ``__init__``. An unknown key, a wrong type or a value
out of range is one clear error that names the file and the key; a misspelt key suggests the right one.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import pydantic
import yaml
from pydantic.dataclasses import dataclass as pydantic_dataclass

from hrm_text.contracts import UserError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass whose values are checked and whose unknown keys are errors."""
    config = pydantic.ConfigDict(extra="forbid", strict=False, validate_default=False)
    return pydantic_dataclass(frozen=True, kw_only=True, config=config)(cls)  # type: ignore[return-value]


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; a missing file or a syntax error is a UserError that names it."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory, expected a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


def from_mapping(cls: type[T], values: Any, where: str) -> T:
    """Build settings from a parsed mapping. ``where`` names the source in errors."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected keys and values, found {type(values).__name__}")
    try:
        return pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        problems = [_explain(cls, problem) for problem in error.errors()]
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems)) from None


def with_options(values: Any, options: Sequence[str], where: str) -> Any:
    """A parsed mapping with what the command line says in the place of its values: ``--section.key VALUE ...``.

    Nothing is checked but the form; ``from_mapping`` knows the keys. A value stays text, for it to turn into what the
    key is; ``null`` is none, several values are a list, and a hyphen in a key is an underscore.
    """
    merged: dict[str, Any] = copy.deepcopy(values) if isinstance(values, dict) else {}
    groups: list[list[str]] = []
    for option in options:
        if option.startswith("--"):
            name, equals, value = option.removeprefix("--").partition("=")
            groups.append([name, value] if equals else [name])
        elif groups:
            groups[-1].append(option)
        else:
            raise UserError(f"{where}: unexpected {option!r}; settings are given as --section.key VALUE")
    for name, *given in groups:
        if not given:
            raise UserError(f"{where}: --{name} has no value; settings are given as --section.key VALUE")
        *sections, key = name.replace("-", "_").split(".")
        section = merged
        for part in sections:
            inner = section.setdefault(part, {})
            if inner is None:
                inner = section[part] = {}
            if not isinstance(inner, dict):
                raise UserError(f"{where}: --{name}: {part!r} is {inner!r} and has no keys")
            section = inner
        parsed = [None if text in ("null", "None") else text for text in given]
        section[key] = parsed[0] if len(parsed) == 1 else parsed
    return merged


def to_mapping(value: Any) -> dict[str, Any]:
    """Settings as plain values, ready for JSON or YAML."""
    return dataclasses.asdict(value)


def _explain(cls: type, problem: Any) -> str:
    *parents, key = [str(part) for part in problem["loc"]] or ["(whole file)"]
    name = ".".join([*parents, key])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _keys(cls, parents)
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {name!r}; {hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"missing key {name!r}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message} (found {problem['input']!r})" if problem["loc"] else message


def _keys(cls: Any, parents: list[str]) -> list[str]:
    """The keys that may stand where ``parents`` lead, starting from settings class ``cls``."""
    for parent in parents:
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        inner = hints.get(parent, cls)
        cls = next((arg for arg in typing.get_args(inner) if dataclasses.is_dataclass(arg)), inner)
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
