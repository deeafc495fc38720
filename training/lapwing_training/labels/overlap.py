"""How far a response agrees with accepted answers: equal, in shared words, in words of the same order. Knows text only.

Words are what white space and signs part, so that a response in a script without spaces is compared as a whole.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from rapidfuzz.distance import LCSseq

ARTICLES = re.compile(r"\b(a|an|the)\b")
WORDS = re.compile(r"[^\W_]+")


def normalise(text: str) -> str:
    """Case, accents, punctuation, articles and white space folded away, as SQuAD's evaluation does.

    References:
        Rajpurkar et al., SQuAD, EMNLP 2016, section 6.
    """
    plain = _folded(text)
    # Dashes and slashes part words ("Guinea-Bissau" is "Guinea Bissau"), other signs join them ("U.S." is "US").
    plain = "".join(" " if _parts_words(sign) else sign for sign in plain if _parts_words(sign) or not _is_sign(sign))
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact_match(response: str, references: Iterable[str]) -> bool:
    """Whether the response equals one of the accepted answers after normalisation."""
    return any(_key(response) == _key(text) for text in references)


def f1(response: str, references: Iterable[str]) -> float:
    """SQuAD's F1 of the normalised words, without regard to their order; the best over the accepted answers.

    Returns:
        in [0, 1]; 1 whenever `exact_match` holds, 0 without accepted answers.
    """
    return _best(response, references, lambda text: _key(text).split(), _shared)


def rouge_l(response: str, references: Iterable[str]) -> float:
    """ROUGE-L: F-measure of the longest common subsequence of words, unstemmed; the best over the accepted answers.

    Returns:
        in [0, 1]; 0 without accepted answers.

    References:
        Lin, ROUGE, 2004, section 3.
    """
    return _best(response, references, lambda text: WORDS.findall(_folded(text)) or [_key(text)], LCSseq.similarity)


def _best(
    response: str,
    references: Iterable[str],
    words_of: Callable[[str], list[str]],
    common: Callable[[Sequence[str], Sequence[str]], int],
) -> float:
    mine = words_of(response)
    return max((_f_measure(mine, words_of(text), common) for text in references), default=0.0)


def _f_measure(mine: list[str], theirs: list[str], common: Callable[[Sequence[str], Sequence[str]], int]) -> float:
    if not mine or not theirs:
        return float(mine == theirs)
    # 2PR / (P + R) with P = common / len(mine) and R = common / len(theirs), in one division: equal texts give 1.0.
    return 2.0 * common(mine, theirs) / (len(mine) + len(theirs))


def _shared(mine: Sequence[str], theirs: Sequence[str]) -> int:
    return (Counter(mine) & Counter(theirs)).total()


def _key(text: str) -> str:
    """What is compared; of an answer that is nothing but an article or punctuation, the text as it stands."""
    return normalise(text) or text.strip().casefold()


def _folded(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(sign for sign in decomposed if not unicodedata.combining(sign)).casefold()


def _parts_words(sign: str) -> bool:
    return sign == "/" or unicodedata.category(sign) == "Pd"


def _is_sign(sign: str) -> bool:
    return sign in string.punctuation or unicodedata.category(sign).startswith("P")
