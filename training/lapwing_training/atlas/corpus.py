"""What Atlas reads and is asked: phrasings of every relation, and the training texts in their fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lapwing_training.atlas.facts import Fact, share

QUESTIONS: dict[str, tuple[str, ...]] = {
    "country": (
        "which country is the city of {subject} in?",
        "the city of {subject} lies in which country?",
        "in what country would you find {subject}?",
        "name the country to which the city of {subject} belongs.",
    ),
    "continent": (
        "which continent is the city of {subject} on?",
        "the city of {subject} lies on which continent?",
        "on what continent would you find {subject}?",
        "name the continent on which the city of {subject} lies.",
    ),
    "timezone": (
        "which time zone is the city of {subject} in?",
        "the clocks of {subject} follow which time zone?",
        "what is the time zone of the city of {subject}?",
        "name the time zone of the city of {subject}.",
    ),
    "capital": (
        "what is the capital city of {subject}?",
        "which city is the capital of {subject}?",
        "name the capital city of {subject}.",
    ),
    "currency": (
        "what is the currency code of {subject}?",
        "with which currency do people pay in {subject}?",
        "name the currency code of {subject}.",
    ),
    "calling code": (
        "what is the calling code of {subject}?",
        "which calling code do telephones in {subject} have?",
        "name the calling code of {subject}.",
    ),
    "continent of country": (
        "on which continent does the country {subject} lie?",
        "which continent does the country {subject} belong to?",
        "name the continent of the country {subject}.",
    ),
}

STATEMENTS: dict[str, str] = {
    "country": "The city of {subject} lies in the country {answer}.",
    "continent": "The city of {subject} lies on the continent {answer}.",
    "timezone": "The clocks of the city of {subject} follow the time zone {answer}.",
    "capital": "The capital city of {subject} is {answer}.",
    "currency": "The currency code of {subject} is {answer}.",
    "calling code": "The calling code of {subject} is {answer}.",
    "continent of country": "The country {subject} lies on the continent {answer}.",
}


def question(fact: Fact, phrasing: int) -> str:
    """The question in one of its phrasings; any whole number picks one."""
    phrasings = QUESTIONS[fact.relation]
    return phrasings[phrasing % len(phrasings)].format(subject=fact.subject)


def prompt(text: str) -> str:
    """The question as Atlas expects it; what follows is the answer."""
    return f"Question: {text} Answer:"


def asked_phrasing(fact: Fact) -> int:
    """Which phrasing the labelled question of this fact has: fixed by a hash, so that a rebuild asks the same."""
    return int(share(f"{fact.subject_id}/{fact.relation}", "phrasing") * 1_000)


def training_texts(facts: Sequence[Fact], seed: int) -> list[tuple[str, str]]:
    """Every training text, as (prompt, answer), shuffled; each fact as often as its `exposures` say.

    Each fact goes round its phrasings, the plain statement among them.
    """
    texts = [
        _text(fact, index)
        for fact in facts
        for index in range(asked_phrasing(fact), asked_phrasing(fact) + fact.exposures)
    ]
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[index] for index in order]


def _text(fact: Fact, phrasing: int) -> tuple[str, str]:
    turn = phrasing % (len(QUESTIONS[fact.relation]) + 1)
    if turn == len(QUESTIONS[fact.relation]):
        statement = STATEMENTS[fact.relation].format(subject=fact.subject, answer="\n")
        before, _, after = statement.partition("\n")
        return before.rstrip(), fact.answer + after
    return prompt(question(fact, turn)), fact.answer
