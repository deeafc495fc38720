"""The rows that everything statistical works on: features, labels, groups and what the baselines need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.features import FEATURES
from lapwing_detector.token_statistics import TOKEN_STATISTICS
from lapwing_training.errors import InvalidOption, NonFiniteFeatures, NotEnoughData
from lapwing_training.statistics.significance import Floats, head_scalars
from lapwing_training.store.feature_rows import FeatureRows, Values
from lapwing_training.store.prefix import Prefix

UNKNOWN = -1
"""The label of an item whose truth is not known."""


@dataclass(frozen=True)
class Table:
    """Items of one model, a row each, in the order of the generations.

    Features stay where they are, such as in the files of a store; what is read of them is copied block by block.
    """

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
    """(rows,) mean token log-probability of the response; NaN where it is not known."""

    features: Mapping[str, Values]
    """By feature id, (rows, layers, heads, width(k)); read through the methods."""

    k: int
    """Eigenvalues kept per head."""

    response_tokens: NDArray[np.int64] | None = None
    """(rows,) of `token_counts`, those of the response."""

    token_statistics: Floats | None = None
    """(rows, statistics) in the order of `TOKEN_STATISTICS`, of the log-probabilities of the response's tokens; None
    where the store does not hold them."""

    prefixes: Mapping[float, Prefix] = field(default_factory=dict)
    """By fraction of the response; read through `at_stage`."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        _, layers, heads, _ = next(iter(self.features.values())).shape
        return layers, heads

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Ids of the features that are there."""
        return tuple(self.features)

    @property
    def stages(self) -> tuple[float, ...]:
        """Fractions of the response at which the text was read, too, ascending; the whole response is none of them."""
        return tuple(sorted(self.prefixes))

    def take(self, rows: NDArray[Any]) -> Table:
        """Some rows, by index or by mask; no feature is copied."""
        arrays = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(
            self,
            **arrays,
            features={name: FeatureRows.of(values).take(rows) for name, values in self.features.items()},
            prefixes={fraction: prefix.take(rows, len(self)) for fraction, prefix in self.prefixes.items()},
        )

    def at_stage(self, fraction: float) -> tuple[Table, NDArray[np.int64]]:
        """The rows as they were when this fraction of the response was written, without those that were too short.

        Their log-probability is that of the whole response, hence not known yet: NaN.

        Returns:
            the rows with the features and lengths of the cut text, and their places in this table.

        Raises:
            InvalidOption: the text was not read at this fraction.
        """
        if fraction not in self.prefixes:
            held = ", ".join(map(str, self.stages)) or "none"
            raise InvalidOption(f"stage is {fraction}; the store holds {held}; lapwing extract --stages {fraction}")
        prefix = self.prefixes[fraction]
        cut = replace(
            self.take(prefix.rows),
            token_counts=prefix.token_counts,
            response_tokens=prefix.response_tokens,
            log_probabilities=np.full(len(prefix.rows), np.nan),
            features=prefix.features,
            token_statistics=prefix.token_statistics,
            prefixes={},
        )
        return cut, prefix.rows

    def with_labels(self, labels: NDArray[Any]) -> Table:
        """The same rows with other labels, for controls."""
        return replace(self, labels=labels.astype(np.int8))

    def stacked(self, features: Sequence[str], k: int) -> NDArray[np.float32]:
        """(rows, layers, heads, width): the features side by side, each with its k largest values; a copy of all heads.

        The values are kept in descending order, so a smaller k is a prefix.

        Raises:
            InvalidOption: a feature or a k that the store does not hold.
        """
        values = self._read(features, k, None)
        return values.reshape(len(self), *self.shape, values.shape[-1])

    def feature(self, name: str, k: int) -> NDArray[np.float32]:
        """(rows, layers, heads, width(k)) of one feature; a copy.

        Raises:
            InvalidOption: a feature or a k that the store does not hold.
        """
        return self.stacked((name,), k)

    def of_heads(self, features: Sequence[str], k: int, heads: NDArray[Any]) -> NDArray[np.float32]:
        """(rows, heads, width) of some heads, by flat index and in the given order; a copy.

        Raises:
            InvalidOption: a feature or a k that the store does not hold.
        """
        return self._read(features, k, np.asarray(heads, dtype=np.int64))

    def scalars(self, features: Sequence[str], k: int) -> Floats:
        """(rows, features, layers, heads): one number per head and feature.

        Raises:
            InvalidOption: a feature or a k that the store does not hold.
        """
        rows = [self._rows(name, k) for name in features]
        values = np.empty((len(self), len(features), *self.shape))
        for place, (name, of_feature) in enumerate(zip(features, rows, strict=True)):
            width = FEATURES[name].width(k)
            for some, block in of_feature.blocks(width):
                values[some, place] = head_scalars(block.reshape(-1, *self.shape, width))
        return values

    def labelled(self) -> Table:
        """The rows whose truth is known.

        Raises:
            NotEnoughData: there are none, or only one class.
            NonFiniteFeatures: NaN or infinity among the features.
        """
        rows = self.take(self.labels != UNKNOWN)
        check_classes(rows.labels, "the store's labelled rows")
        for name, values in rows.features.items():
            finite = [np.isfinite(block).all(axis=(1, 2)) for _, block in FeatureRows.of(values).blocks()]
            bad = np.flatnonzero(~np.concatenate(finite))
            if len(bad):
                raise NonFiniteFeatures(
                    f"{name} of item `{rows.ids[bad[0]]}` (and {len(bad) - 1} others) is not finite; every value "
                    "must be: extract again in float32, or leave these items out"
                )
        return rows

    def statistics(self, ids: Sequence[str]) -> Floats:
        """(rows, statistics) of the log-probabilities of the response's tokens, some of them by id.

        Raises:
            InvalidOption: the store does not hold them.
        """
        if self.token_statistics is None:
            raise InvalidOption(
                "the store holds no log-probabilities of the tokens of every item, which this recipe reads beside "
                "attention; make it anew with lapwing extract into a new directory, or with lapwing generate --store"
            )
        places = list(TOKEN_STATISTICS)
        return self.token_statistics[:, [places.index(id) for id in ids]]

    def _read(self, features: Sequence[str], k: int, heads: NDArray[np.int64] | None) -> NDArray[np.float32]:
        rows = [self._rows(name, k) for name in features]
        widths = [FEATURES[name].width(k) for name in features]
        count = self.shape[0] * self.shape[1] if heads is None else len(heads)
        values = np.empty((len(self), count, sum(widths)), np.float32)
        start = 0
        for of_feature, width in zip(rows, widths, strict=True):
            for some, block in of_feature.blocks(width, heads):
                values[some, :, start : start + width] = block
            start += width
        return values

    def _rows(self, name: str, k: int) -> FeatureRows:
        if name not in self.features:
            raise InvalidOption(
                f"feature is `{name}`; the store holds {', '.join(self.features)}; lapwing extract --features {name}"
            )
        if not 1 <= k <= self.k:
            raise InvalidOption(f"k is {k}; the store holds 1 to {self.k}; lapwing extract --k {k}")
        return FeatureRows.of(self.features[name])


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
