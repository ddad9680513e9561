"""The sources of training records: what one is, the table of all, and what to install where one is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hrm_text.contracts import Example, UserError, did_you_mean


class Keyed(NamedTuple):
    """An example with what decides on which side of the split it lies."""

    task: str
    key: str
    """Canonical text of the problem, wording-free as far as the source allows."""
    example: Example
    answer: str
    """What scoring compares: the final answer, where the response is longer."""


@dataclass(frozen=True, slots=True)
class Need:
    """Something a source reads that this package does not bring."""

    is_there: Callable[[], bool]
    how: str
    """What to type to get it."""


def python_module(module: str) -> Need:
    """A module of the ``gpu-preset`` extra."""
    return Need(lambda: importlib.util.find_spec(module) is not None, "pip install 'hrm-text[gpu-preset]'")


def debian_file(path: Callable[[], Path], package: str, otherwise: str) -> Need:
    """A file of a Debian package; ``otherwise`` says how to name another place for it."""
    return Need(lambda: path().exists(), f"apt-get install {package} ({otherwise})")


Generate = Callable[[str, int], Iterator[Keyed]]
"""From a file's name and a seed to its examples, both sides of the split, endless or not."""


@dataclass(frozen=True)
class Source:
    """A registered generator of examples: one file per stratum of the sampler."""

    name: str
    description: str
    licence: str
    home: str
    condition: str
    """The tags of its examples."""
    needs: Need | None
    files: Mapping[str, int]
    """Examples of each file in the mixture of the GPU preset at scale 1."""
    generate: Generate

    @property
    def is_available(self) -> bool:
        return self.needs is None or self.needs.is_there()


SOURCES: dict[str, Source] = {}
"""Every source by name; filled by the modules of this package."""


def source(
    name: str, *, licence: str, home: str, condition: str, files: Mapping[str, int], needs: Need | None = None
) -> Callable[[Generate], Generate]:
    """Register the decorated generator as a source; the first line of its docstring is the description."""

    def register(generate: Generate) -> Generate:
        assert name not in SOURCES, f"source {name!r} is registered twice"
        description = (generate.__doc__ or "").partition("\n")[0].rstrip(".")
        SOURCES[name] = Source(name, description, licence, home, condition, needs, dict(files), generate)
        return generate

    return register


def known_source(name: str) -> Source:
    """The source of that name, whether or not what it needs is there.

    Raises:
        UserError: there is none; the message suggests a close one and lists all.
    """
    if name not in SOURCES:
        hint = did_you_mean(name, SOURCES)
        raise UserError(f"unknown source {name!r}: {hint}The sources are {', '.join(sorted(SOURCES))}")
    return SOURCES[name]


def find_source(name: str) -> Source:
    """The source of that name, ready to be read.

    Raises:
        UserError: there is none, or what it needs is missing: the message says what to install.
    """
    found = known_source(name)
    if found.needs is not None and not found.is_available:
        raise UserError(f"source {name!r} needs something that is not installed: {found.needs.how}")
    return found


def available() -> list[Source]:
    """The sources whose needs are met, in the order of their registration."""
    return [found for found in SOURCES.values() if found.is_available]
