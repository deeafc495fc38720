"""Who is tested on whom: splits and folds that never part a group. Knows labels and groups only."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from lapwing_training.errors import InvalidData, InvalidOption, NotEnoughData
from lapwing_training.store.table import Table, check_classes

Rows = NDArray[np.int64]
Fold = tuple[Rows, Rows]
"""Rows to fit on, rows to test on."""


def split_by_group(table: Table, test_share: float, seed: int) -> Fold:
    """Training and test rows; a group's side depends on its name and the seed alone.

    So the same group falls on the same side in every store, however many others stand beside it. The `split` of the
    generations wins where it is given.

    Args:
        table: labelled rows.
        test_share: expected share of the groups that are tested on, in (0, 1).
        seed: another seed, another split.

    Raises:
        InvalidOption: `test_share` is not a share.
        InvalidData: the given splits put a group on both sides.
        NotEnoughData: a side is left with one class only.
    """
    if not 0.0 < test_share < 1.0:
        raise InvalidOption(f"test share is {test_share}; it must lie between 0 and 1, such as 0.2")
    given = _given_splits(table)
    names, codes = np.unique(table.groups, return_inverse=True)
    tested = np.array(
        [given[name] == "test" if name in given else _share_of(name, seed) < test_share for name in names]
    )[codes]
    check_classes(table.labels[~tested], "training rows")
    check_classes(table.labels[tested], "test rows")
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def grouped_folds(labels: NDArray[Any], groups: NDArray[Any], count: int, seed: int) -> list[Fold]:
    """Folds with about the same share of hallucinations each, no group on two sides.

    Raises:
        NotEnoughData: too few groups, or a fold without one of the classes.
    """
    for name, label in (("hallucinated", 1), ("other", 0)):
        found = len(np.unique(groups[labels == label]))
        if found < count:
            raise NotEnoughData(
                f"{found} groups with {name} rows; {count} folds need at least {count}: label more generations"
            )
    # Where no group repeats the plain folds keep the same promise, two hundred times as fast on 8,000 rows.
    kind = StratifiedKFold if len(np.unique(groups)) == len(groups) else StratifiedGroupKFold
    folds = kind(n_splits=count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "least populated class": checked above and below
        pairs = list(folds.split(np.zeros(len(labels)), labels, groups))
    for fitted, tested in pairs:
        check_classes(labels[fitted], f"rows to fit on in one of {count} folds")
        check_classes(labels[tested], f"rows to test on in one of {count} folds")
    return pairs


def _given_splits(table: Table) -> dict[str, str]:
    """The side of each group that has one; reading checks this, but stores can be merged."""
    given: dict[str, str] = {}
    for group, split in zip(table.groups.tolist(), table.splits.tolist(), strict=True):
        if split and given.setdefault(group, split) != split:
            message = f"group `{group}` stands in `train` and in `test`; give all items of a group the same `split`"
            raise InvalidData("the given split", None, message)
    return given


def _share_of(name: str, seed: int) -> float:
    """A number in [0, 1) that only the name and the seed decide."""
    hashed = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(hashed[:8], "big") / 2.0**64
