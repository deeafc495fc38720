"""How an answer is to be written: the choices of whoever asks for one. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lapwing_detector.detection import DEFAULT_FALSE_POSITIVE_RATE
from lapwing_detector.errors import InvalidInput


@dataclass(frozen=True)
class GenerationOptions:
    """How the next token is chosen, when the answer ends, and what is said of it meanwhile.

    Raises:
        InvalidInput: with the field that can't be used.
    """

    max_new_tokens: int = 64
    """At least 1; fewer are written where the model's context ends."""

    temperature: float = 0.0
    """0 always takes the likeliest token."""

    top_p: float = 1.0
    """Smallest share of probability from which a token is drawn, in (0, 1]."""

    seed: int | None = None
    """Makes sampling repeatable; in [0, 2^63)."""

    false_positive_rate: float = DEFAULT_FALSE_POSITIVE_RATE
    """Operating point of the last detection."""

    stop_strings: tuple[str, ...] = ()
    """The answer ends where one of these appears in its text, which leaves it out."""

    stop_when_probability_above: float | None = None
    """Ends the answer as soon as its running probability is above this; in [0, 1)."""

    minimum_tokens: int = 1
    """Written before `stop_when_probability_above` may end the answer."""

    score_every: int = 1
    """Every how many tokens there is a score; the last token has one in any case."""

    contributions: bool = False
    """Whether scored tokens come with the shares of all tokens so far."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "minimum_tokens", "score_every"):
            value = getattr(self, name)
            if not (is_whole(value) and value >= 1):
                raise InvalidInput(name, f"is {value!r}; it must be a whole number, at least 1")
        if not (is_number(self.temperature) and self.temperature >= 0):
            raise InvalidInput("temperature", f"is {self.temperature!r}; it must be finite and at least 0")
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InvalidInput("top_p", f"is {self.top_p!r}; it must lie in (0, 1]")
        if self.seed is not None and not (is_whole(self.seed) and 0 <= self.seed < 1 << 63):
            raise InvalidInput("seed", f"is {self.seed!r}; it must be a whole number in [0, 2^63)")
        above = self.stop_when_probability_above
        if above is not None and not (is_number(above) and 0 <= above < 1):
            raise InvalidInput("stop_when_probability_above", f"is {above!r}; it must lie in [0, 1)")
        for i, text in enumerate(self.stop_strings):
            if not (isinstance(text, str) and text):
                raise InvalidInput(f"stop_strings[{i}]", f"is {text!r}; it must be text, and not empty")


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)
