"""The first Newton step of balanced logistic regressions: cheap enough to choose by. Knows arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from lapwing_training.statistics.significance import Floats

STRENGTHS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0)
"""Inverse L2 penalties (`C`) that are tried, the simplest first."""


def first_newton_steps(
    columns: NDArray[Any],
    labels: NDArray[Any],
    tested: NDArray[Any],
    sizes: Sequence[int],
    strengths: Sequence[float] = STRENGTHS,
) -> list[list[Floats]]:
    """Logits of the first Newton step from zero of balanced logistic regressions, for nested sets of columns.

    For signals as weak as a head's the step ranks as the full fit does, and one Gram matrix serves all sizes and
    strengths. It only decides among them; the probe itself is fitted to the end.

    Args:
        columns: (rows, columns) standardised; large products are computed in their precision.
        labels: (rows,)
        tested: (tested rows, columns)
        sizes: how many leading columns each fit has.
        strengths: the `C` of each fit.

    Returns:
        for each size and each strength, (tested rows,)
    """
    weight = np.where(labels == 1, 0.5 / (labels == 1).mean(), 0.5 / (labels == 0).mean()).astype(columns.dtype)
    # Balanced weights put the gradient of the intercept at zero; centring by them decouples it in the Hessian, too.
    centre = weight @ columns / weight.sum()
    centred, tested = columns - centre, tested - centre
    push = (weight * (labels - 0.5)).astype(columns.dtype)  # (rows,)
    root = np.sqrt(0.25 * weight)  # (rows,): of each row's share of the Hessian
    narrow = [size for size in sizes if size <= len(columns)]
    hessian = _gram(centred[:, : max(narrow, default=0)] * root[:, None])
    found = []
    for size in sizes:
        part = centred[:, :size]
        if size <= len(columns):
            steps = _penalised(hessian[:size, :size], part.T @ push, strengths)
        else:  # fewer rows than columns: the same step through the rows' own products
            products = (part @ part.T) * np.outer(root, root)
            steps = part.T @ (root[:, None] * _penalised(products, push / root, strengths).astype(columns.dtype))
        found.append(list((tested[:, :size] @ steps.astype(columns.dtype)).T.astype(np.float64)))
    return found


def _gram(columns: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(columns.T @ columns)


def _penalised(matrix: NDArray[Any], right: NDArray[Any], strengths: Sequence[float]) -> Floats:
    """(unknowns, strengths): the solutions with each penalty added to the diagonal, in float64."""
    exact, right = matrix.astype(np.float64), right.astype(np.float64)
    diagonal, solved = exact.diagonal().copy(), np.empty((len(right), len(strengths)))
    for number, strength in enumerate(strengths):
        np.fill_diagonal(exact, diagonal + 1.0 / strength)
        try:
            solved[:, number] = cho_solve(cho_factor(exact, check_finite=False), right, check_finite=False)
        except LinAlgError:
            solved[:, number] = np.linalg.lstsq(exact, right, rcond=None)[0]
    return solved
