"""What each head can do alone: a small logistic regression for every head, all of them solved together.

Knows values, labels and folds; not what the heads are selected for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from lapwing_training.progress import Advance, silent
from lapwing_training.recipes.linear_probe import SCALE_FLOOR
from lapwing_training.statistics.ranks import Floats, Ranked, require_both
from lapwing_training.statistics.splits import Fold
from lapwing_training.store.table import Table

STRENGTH = 1.0
"""Inverse L2 penalty (`C`) of every head: a few standardised numbers need little of it."""

HEADS_AT_ONCE = 16
"""Heads that are read, fitted and tested together, which bounds the memory."""

TOLERANCE = 1e-10
"""Of the gradient of the mean loss; a sum over 10,000 rows is rounded at about a hundredth of it."""

MOST_STEPS = 100


@dataclass(frozen=True)
class HeadProbes:
    """One fitted logistic regression for each head."""

    weights: Floats
    """(heads, width) acting on plain values: the standardisation is folded in."""

    intercepts: Floats
    """(heads,)"""

    def logits(self, values: NDArray[Any]) -> Floats:
        """(rows, heads) of values (rows, heads, width)."""
        return np.asarray(np.einsum("nhw,hw->nh", values, self.weights)) + self.intercepts


def head_probe_auroc(
    table: Table, features: Sequence[str], k: int, folds: Sequence[Fold], advance: Advance = silent
) -> Floats:
    """Cross-validated AUROC of each head's own logistic regression on its values.

    Args:
        table: labelled rows.
        features: ids; a head's values are those of all of them.
        k: eigenvalues per head and feature.
        folds: rows to fit on and rows to test on.
        advance: called `head_probe_steps` times.

    Returns:
        (layers, heads)

    Raises:
        NotEnoughData: a side of a fold lacks one of the classes.
        InvalidOption: a feature or a k that the table does not hold.
    """
    found = []
    for heads in _blocks(table):
        found.append(cross_validated_auroc(table.of_heads(features, k, heads), table.labels, folds))
        advance()
    return np.concatenate(found).reshape(table.shape)


def head_probe_steps(table: Table) -> int:
    """How often `head_probe_auroc` advances."""
    return len(_blocks(table))


def cross_validated_auroc(values: NDArray[Any], labels: NDArray[Any], folds: Sequence[Fold]) -> Floats:
    """Mean over the folds of the AUROC on rows that neither fit nor standardisation saw.

    Args:
        values: (rows, heads, width)
        labels: (rows,) 1 hallucinated, 0 not.
        folds: rows to fit on and rows to test on.

    Returns:
        (heads,)

    Raises:
        NotEnoughData: a side of a fold lacks one of the classes.
    """
    scores = [
        Ranked.of(fit_head_probes(values[fitted], labels[fitted]).logits(values[tested]), labels[tested]).auroc
        for fitted, tested in folds
    ]
    return np.asarray(np.mean(scores, axis=0))


def fit_head_probes(values: NDArray[Any], labels: NDArray[Any], strength: float = STRENGTH) -> HeadProbes:
    """Standardise each head's values and fit a logistic regression with balanced classes to each head.

    Args:
        values: (rows, heads, width), training rows only.
        labels: (rows,) 1 hallucinated, 0 not.
        strength: `C`, as scikit-learn counts it.

    Raises:
        NotEnoughData: one of the two classes is missing.
        ArithmeticError: a fit did not settle, which finite values can't cause.
    """
    positive = labels == 1
    require_both(positive)
    columns = np.array(values.transpose(1, 2, 0), dtype=np.float64, order="C")  # (heads, width, rows), a copy
    mean = columns.mean(axis=2)
    columns -= mean[..., None]
    scale = np.maximum(np.sqrt(np.einsum("hwn,hwn->hw", columns, columns) / len(labels)), SCALE_FLOOR)
    columns /= scale[..., None]
    solved = newton(with_intercept(columns), positive, strength)  # (heads, width + 1)
    weights = solved[:, :-1] / scale
    return HeadProbes(weights, solved[:, -1] - (weights * mean).sum(axis=1))


def newton(columns: Floats, positive: NDArray[np.bool_], strength: float) -> Floats:
    """Coefficients of many balanced logistic regressions by Newton's method, a step for all at once.

    A step that does not make the gradient smaller is halved, so that it settles from everywhere.

    Args:
        columns: (fits, columns, rows); the last column is the intercept's and is not penalised.
        positive: (rows,)
        strength: inverse L2 penalty on the summed loss.

    Returns:
        (fits, columns)

    Raises:
        ArithmeticError: a gradient is not small after `MOST_STEPS`.
    """
    weights = np.where(positive, 0.5 / positive.mean(), 0.5 / (~positive).mean())  # (rows,)
    penalty = np.full(columns.shape[1], 1.0 / strength)
    penalty[-1] = 0.0
    here = np.zeros(columns.shape[:2])
    step, size = np.zeros_like(here), np.full(len(here), np.inf)  # size: of the gradient at `here`, (fits,)
    for _ in range(MOST_STEPS):
        there = here + step
        gradient, hessian = _derivatives(columns, positive, weights, penalty, there)
        reached = np.linalg.norm(gradient, axis=1)
        better = (reached < size)[:, None]
        newton_step = -np.linalg.solve(hessian, gradient[..., None])[..., 0]
        here, size = np.where(better, there, here), np.minimum(reached, size)
        step = np.where(better, newton_step, 0.5 * step)
        if (size <= TOLERANCE * len(positive)).all():
            return here
    raise ArithmeticError(
        f"the gradient of {int((~(size <= TOLERANCE * len(positive))).sum())} of {len(size)} fits is not below "
        f"{TOLERANCE:g} per row after {MOST_STEPS} steps; are all values finite?"
    )


def _derivatives(
    columns: Floats, positive: NDArray[np.bool_], weights: Floats, penalty: Floats, coefficients: Floats
) -> tuple[Floats, Floats]:
    """Gradient (fits, columns) and Hessian (fits, columns, columns) of the summed loss."""
    said = expit(np.matmul(coefficients[:, None, :], columns))  # (fits, 1, rows)
    gradient = np.matmul(columns, (weights * (said - positive)).transpose(0, 2, 1))[..., 0]
    hessian = np.matmul(columns * (weights * said * (1.0 - said)), columns.transpose(0, 2, 1))
    return gradient + penalty * coefficients, hessian + np.diag(penalty)


def with_intercept(columns: Floats) -> Floats:
    """A last column of ones; (fits, columns, rows)."""
    return np.concatenate([columns, np.ones_like(columns[:, :1])], axis=1)


def _blocks(table: Table) -> list[NDArray[np.int64]]:
    layers, heads = table.shape
    return [
        np.arange(start, min(start + HEADS_AT_ONCE, layers * heads))
        for start in range(0, layers * heads, HEADS_AT_ONCE)
    ]
