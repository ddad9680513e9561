from __future__ import annotations

import dataclasses

import pytest

from hrm_text.contracts import UserError
from hrm_text.data.sources import SOURCES, available, find_source
from hrm_text.data.sources.registry import Need


def test_every_source_names_its_licence_its_home_and_its_files() -> None:
    for found in SOURCES.values():
        assert found.description
        assert found.licence
        assert found.home
        assert found.condition
        assert all(count > 0 for count in found.files.values())


def test_the_mixture_has_about_1_2_million_examples() -> None:
    assert 1_100_000 < sum(count for found in SOURCES.values() for count in found.files.values()) < 1_300_000


def test_our_own_tasks_need_nothing() -> None:
    assert "procedural" in [found.name for found in available()]


def test_a_missing_need_is_an_error_that_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Need(lambda: False, "pip install 'hrm-text[gpu-preset]'")
    monkeypatch.setitem(SOURCES, "reasoning_gym", dataclasses.replace(SOURCES["reasoning_gym"], needs=missing))
    with pytest.raises(UserError, match=r"'reasoning_gym' needs .*: pip install 'hrm-text\[gpu-preset\]'"):
        find_source("reasoning_gym")
    assert "reasoning_gym" not in [found.name for found in available()]


def test_wordnet_elsewhere_is_found_and_its_absence_names_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("wordnet")
    monkeypatch.setenv("WNSEARCHDIR", str(elsewhere))
    with pytest.raises(UserError, match="apt-get install wordnet-base"):
        find_source("wordnet")
    (elsewhere / "data.noun").touch()
    assert find_source("wordnet").name == "wordnet"


def test_an_unknown_source_is_an_error_that_suggests_and_lists() -> None:
    with pytest.raises(UserError, match=r"unknown source 'wordnett': did you mean 'wordnet'\?.*procedural"):
        find_source("wordnett")
