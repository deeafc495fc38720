"""What the numbers of a slice must keep to, rule by rule. Knows arrays only.

What a map of a causal model must be: every weight in [0, 1], none after the row's own token, every row adding up to 1
(to more than 0 and at most 1 where the model has attention sinks). Sums over rows must be those of some such map.

What no rule can tell: a map of other tokens, heads in each other's place, rows that changed places before they were
summed up, and whatever else some causal map could have given. A single weight may be 0, since small ones are lost where
they are computed; so a head whose tokens never attend to themselves is taken, but for the first one, which has nothing
else to attend to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lapwing_server.attention_slices import BY_ROW, Numbers, Rules, Sums

ANOTHER_WAY: Final = 2.0**-4
"""By what part of itself one weight may differ that is sent twice. Both come from the same map, but perhaps by two ways
of computing it, whose scores differ by some hundredths; the mean logarithm moves by no more."""


@dataclass(frozen=True)
class Doubt:
    """A rule, and where it is broken."""

    broken: NDArray[np.bool_]
    """(heads, ...)."""

    field: str
    reason: str
    message: str


def summary_doubts(sums: Sums, first_token: int, rules: Rules) -> Iterator[Doubt]:
    """All that can be told from sums over rows, rule by rule.

    Numbers that break none are, up to rounding, the sums of some causal map: what a token receives from others must
    come from rows after its own, each of which has to give what it does not keep for itself.
    """
    rows, columns = sums.diagonal.shape[1], sums.received.shape[1]
    one, field = rules.tolerance(columns), "summary.received"
    seen = np.minimum(rows, np.arange(columns, 0, -1))  # (columns,): rows that see each token
    own, to_give = np.zeros((2, *sums.received.shape))  # (heads, columns)
    own[:, first_token:] = sums.diagonal
    to_give[:, first_token:] = 1.0 - sums.diagonal
    others = sums.received - own
    yield not_finite(sums.diagonal, "summary.diagonal")
    yield not_finite(sums.received, field)
    yield outside(sums.diagonal, one, "summary.diagonal")
    yield unlike_one(sums.received.sum(axis=-1), rows, rows * one, rules.sinks, field)
    if first_token == 0:
        yield unlike_one(sums.diagonal[:, 0], 1, one, rules.sinks, "summary.diagonal")
    message = "what a token receives holds its attention to itself, and can't be less"
    yield Doubt(others < -(rules.relative() * own + seen * columns * BY_ROW), field, "NOT_ATTENTION", message)
    message = "the last row alone sees its token, which receives what that row has for itself"
    apart = differ(sums.received[:, -1], sums.diagonal[:, -1], one, rules.least())
    yield Doubt(apart, field, "NOT_ATTENTION", message)
    message = "tokens receive more than the rows that see them have to give"
    too_much = from_each_on(others) > from_each_on(to_give) - to_give + seen * one
    yield Doubt(too_much, field, "NOT_ATTENTION", message)


def rows_doubts(weights: Numbers, diagonal: Numbers | None, first_token: int, rules: Rules) -> Iterator[Doubt]:
    """All that can be told from whole rows, rule by rule; arguments as for `rows_sums`."""
    tolerance = rules.tolerance(weights.shape[2], weights.dtype)
    yield not_finite(weights, "rows.weights")
    yield outside(weights, tolerance, "rows.weights")
    later = np.triu(np.ones(weights.shape[1:], bool), first_token + 1)  # (rows, columns)
    yield Doubt((weights != 0) & later, "rows.weights", "NOT_ATTENTION", "a row must be 0 after its own token")
    yield unlike_one(weights.sum(axis=2, dtype=np.float64), 1, tolerance, rules.sinks, "rows.weights")
    if diagonal is not None:
        yield not_finite(diagonal, "rows.diagonal")
        yield outside(diagonal, tolerance, "rows.diagonal")
        within = np.diagonal(weights, first_token, 1, 2).astype(np.float32)
        apart = differ(diagonal, within, tolerance, rules.least(weights.dtype))
        yield Doubt(apart, "rows.diagonal", "NOT_ATTENTION", f"is not that of the weights within {tolerance:.2g}")


def from_each_on(values: Numbers) -> Numbers:
    """(heads, columns): the sum over each column and all after it."""
    sums: Numbers = values[:, ::-1].cumsum(axis=1)[:, ::-1]
    return sums


def differ(one: Numbers, other: Numbers, tolerance: float, least: float) -> NDArray[np.bool_]:
    """Where two numbers can't be the same weight, none of them lost; `least` is what may be lost."""
    within = np.minimum(tolerance, ANOTHER_WAY * np.maximum(one, other) + least)
    apart: NDArray[np.bool_] = np.abs(np.subtract(one, other, dtype=np.float64)) > within
    return apart


def not_finite(values: Numbers, field: str) -> Doubt:
    """Every number must be finite."""
    message = "is not finite; capture this head, and load the model in float32 or bfloat16"
    return Doubt(~np.isfinite(values), field, "NON_FINITE", message)


def outside(values: Numbers, tolerance: float, field: str) -> Doubt:
    """Every weight must lie in [0, 1]."""
    message = f"must lie in [0, 1], up to {tolerance:.2g} above"
    return Doubt((values < 0) | (values > 1 + tolerance), field, "NOT_ATTENTION", message)


def unlike_one(values: Numbers, expected: int, tolerance: float, sinks: bool, field: str) -> Doubt:
    """Rows must add up to 1 each, or with sinks to at most that, and to more than 0: sinks never take all."""
    too_little = values <= 0 if sinks else values < expected - tolerance
    broken = too_little | (values > expected + tolerance)
    message = (
        f"must add up to more than 0 and at most {expected}, within {tolerance:.2g}"
        if sinks
        else f"does not add up to {expected} within {tolerance:.2g}; of a model with attention sinks the header says so"
    )
    return Doubt(broken, field, "NOT_ATTENTION", message)
