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
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Case, accents, punctuation of any script, articles and white space folded away."""
    plain = _folded(text)
    # Dashes and slashes part words ("Guinea-Bissau" is "Guinea Bissau"), other signs join them ("U.S." is "US").
    plain = "".join(" " if _parts_words(sign) else sign for sign in plain if _parts_words(sign) or not _is_sign(sign))
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact_match(response: str, references: Iterable[str]) -> bool:
    """Whether the response equals one of the accepted answers after normalisation."""
    return any(_key(response) == _key(text) for text in references)


def f1(response: str, references: Iterable[str]) -> float:
    """SQuAD's F1 of the words, without regard to their order; the best over the accepted answers.

    Words are normalised as SQuAD does and no further, so that figures compare with published ones: small letters, no
    ASCII punctuation (which joins what it stood between), no articles. Accents and other scripts' signs count.

    Returns:
        in [0, 1]; 0 without accepted answers.

    References:
        Rajpurkar et al., SQuAD, EMNLP 2016, section 6.
    """
    return _best(response, references, _squad_words, _shared)


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


def _squad_words(text: str) -> list[str]:
    """Of an answer that is nothing but articles or punctuation, the text as it stands."""
    return ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split() or [text.strip().casefold()]


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
