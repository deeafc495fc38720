"""Labels by rule: 1 means hallucinated, which for a question with known answers means wrong. Knows text only."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import replace

from lapwing_training.errors import InvalidOption
from lapwing_training.generations import LabelledGeneration

ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Case, accents, punctuation, articles and white space folded away, as SQuAD's evaluation does.

    References:
        Rajpurkar et al., SQuAD, EMNLP 2016, section 6.
    """
    decomposed = unicodedata.normalize("NFKD", text)
    plain = "".join(sign for sign in decomposed if not unicodedata.combining(sign)).casefold()
    # Dashes and slashes part words ("Guinea-Bissau" is "Guinea Bissau"), other signs join them ("U.S." is "US").
    plain = "".join(" " if _parts_words(sign) else sign for sign in plain if _parts_words(sign) or not _is_sign(sign))
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact_match(response: str, references: Iterable[str]) -> bool:
    """Whether the response equals one of the accepted answers after normalisation."""
    return any(_key(response) == _key(text) for text in references)


def _key(text: str) -> str:
    """What is compared; of an answer that is nothing but an article or punctuation, the text as it stands."""
    return normalise(text) or text.strip().casefold()


RULES: dict[str, Callable[[str, Iterable[str]], bool]] = {"exact": exact_match}


def label_generations(generations: Iterable[LabelledGeneration], rule: str = "exact") -> list[LabelledGeneration]:
    """Every item with a new label: 0 right, 1 wrong, None where there is nothing to compare with.

    Raises:
        InvalidOption: no such rule.
    """
    if rule not in RULES:
        raise InvalidOption(f"rule is `{rule}`; known rules: {', '.join(RULES)}")
    return [replace(item, label=_label(item, RULES[rule])) for item in generations]


def _label(item: LabelledGeneration, is_right: Callable[[str, Iterable[str]], bool]) -> int | None:
    return int(not is_right(item.response, item.references)) if item.references else None


def _parts_words(sign: str) -> bool:
    return sign == "/" or unicodedata.category(sign) == "Pd"


def _is_sign(sign: str) -> bool:
    return sign in string.punctuation or unicodedata.category(sign).startswith("P")
