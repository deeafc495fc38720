"""The rows that everything statistical works on: features, labels, groups and what the baselines need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.features import FEATURES
from lapwing_training.errors import InvalidOption, NonFiniteFeatures, NotEnoughData
from lapwing_training.significance import Floats, head_scalars

UNKNOWN = -1
"""The label of an item whose truth is not known."""


@dataclass(frozen=True)
class Table:
    """Items of one model, a row each, in the order of the generations."""

    ids: NDArray[np.str_]
    groups: NDArray[np.str_]
    """(rows,) rows of one group never straddle a split."""

    labels: NDArray[np.int8]
    """(rows,) 1 hallucinated, 0 not, -1 unknown."""

    splits: NDArray[np.str_]
    """(rows,) `train`, `test` or empty."""

    strata: NDArray[np.str_]
    """(rows,) kind of item, such as the question's relation; empty where there is none."""

    token_counts: NDArray[np.int64]
    log_probabilities: Floats
    """(rows,) mean token log-probability of the response; NaN where it was not kept."""

    features: Mapping[str, NDArray[np.float32]]
    """By feature id, (rows, layers, heads, width(k))."""

    k: int
    """Eigenvalues kept per head."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        return next(iter(self.features.values())).shape[1:3]

    def take(self, rows: NDArray[Any]) -> Table:
        """Some rows, by index or by mask."""
        arrays = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays, features={name: values[rows] for name, values in self.features.items()})

    def with_labels(self, labels: NDArray[Any]) -> Table:
        """The same rows with other labels, for controls."""
        return replace(self, labels=labels.astype(np.int8))

    def stacked(self, features: Sequence[str], k: int) -> NDArray[np.float32]:
        """(rows, layers, heads, width): the features side by side, each with its k largest values.

        The values are kept in descending order, so a smaller k is a prefix.

        Raises:
            InvalidOption: a feature or a k that the store does not hold.
        """
        return np.concatenate([self.feature(name, k) for name in features], axis=-1)

    def feature(self, name: str, k: int) -> NDArray[np.float32]:
        """(rows, layers, heads, width(k)) of one feature.

        Raises:
            InvalidOption: a feature or a k that the store does not hold.
        """
        if name not in self.features:
            raise InvalidOption(
                f"feature is `{name}`; the store holds {', '.join(self.features)}; lapwing extract --features {name}"
            )
        if not 1 <= k <= self.k:
            raise InvalidOption(f"k is {k}; the store holds 1 to {self.k}; lapwing extract --k {k}")
        return self.features[name][..., : FEATURES[name].width(k)]

    def scalars(self, features: Sequence[str], k: int) -> Floats:
        """(rows, features, layers, heads): one number per head and feature."""
        return np.stack([head_scalars(self.feature(name, k)) for name in features], axis=1)

    def labelled(self) -> Table:
        """The rows whose truth is known.

        Raises:
            NotEnoughData: there are none, or only one class.
            NonFiniteFeatures: NaN or infinity among the features.
        """
        rows = self.take(self.labels != UNKNOWN)
        check_classes(rows.labels, "the store's labelled rows")
        for name, values in rows.features.items():
            bad = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2, 3)))
            if len(bad):
                raise NonFiniteFeatures(
                    f"{name} of item `{rows.ids[bad[0]]}` (and {len(bad) - 1} others) is not finite; every value "
                    "must be: extract again in float32, or leave these items out"
                )
        return rows


def check_classes(labels: NDArray[Any], where: str, least: int = 1) -> None:
    """Both classes are there.

    Raises:
        NotEnoughData: fewer than `least` rows of one of them.
    """
    hallucinated, other = int((labels == 1).sum()), int((labels == 0).sum())
    if min(hallucinated, other) < least:
        raise NotEnoughData(
            f"{where}: {hallucinated} hallucinated (1) and {other} other (0) rows; at least {least} of each are "
            "needed: label more generations (lapwing label), or ask harder or easier questions"
        )
