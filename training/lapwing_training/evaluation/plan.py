"""Which of the labelled rows are fitted on, judged or set apart. Knows labels, groups and given splits only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupShuffleSplit

from lapwing_training.errors import NotEnoughData
from lapwing_training.statistics.splits import Rows, split_by_group
from lapwing_training.store.table import Table, check_classes

OUTER_FOLDS = 5
TEST_SHARE = 0.2
"""Of the groups, where the items say of some that they are tested on and of others nothing."""

APART_SHARE = 0.2
"""Of the groups, which only set the thresholds of a guarantee."""


@dataclass(frozen=True)
class Plan:
    """Which of the labelled rows serve for what."""

    protocol: str
    """`nested` or `split`."""

    fitted: Rows
    """Rows that the saved probe is fitted on."""

    tested: Rows
    """Rows that are judged: other ones, or in `nested` the same, each by a probe that did not see its group."""

    apart: Rows
    """Whole groups that only set the thresholds of a guarantee; empty where nothing is guaranteed."""

    @property
    def folds(self) -> int:
        """How often a recipe is fitted to be judged."""
        return OUTER_FOLDS if self.protocol == "nested" else 1

    @property
    def pairs(self) -> int:
        """How many pairs of judged folds need a probe that is fitted on the rows of neither."""
        return math.comb(self.folds, 2)


def plan_rows(table: Table, test_share: float | None, guarantee: bool, seed: int) -> Plan:
    """A fixed split where the items bring one or a share is given, nested cross-validation otherwise.

    Args:
        table: labelled rows.
        test_share: of the groups, in (0, 1).
        guarantee: set whole groups apart, too.
        seed: another seed, another lot.

    Raises:
        InvalidOption: `test_share` is not a share.
        InvalidData: a group is on both sides of the given split.
        NotEnoughData: a side is left with one class only.
    """
    if test_share is None and not (table.splits == "test").any():
        fitted, apart = _set_apart(table, np.arange(len(table)), guarantee, seed)
        return Plan("nested", fitted, fitted, apart)
    before, tested = split_by_group(table, TEST_SHARE if test_share is None else test_share, seed)
    fitted, apart = _set_apart(table, before, guarantee, seed)
    return Plan("split", fitted, tested, apart)


def _set_apart(table: Table, rows: Rows, guarantee: bool, seed: int) -> tuple[Rows, Rows]:
    """The rows to be fitted on, and whole groups by lot: chosen by their labels they would not be exchangeable."""
    if not guarantee:
        return rows, rows[:0]
    groups = table.groups[rows]
    if len(np.unique(groups)) <= OUTER_FOLDS:
        raise NotEnoughData(
            f"{len(np.unique(groups))} groups; a guarantee sets a fifth of them apart and {OUTER_FOLDS} folds need the "
            "others: label more generations, or leave --guarantee out"
        )
    lot = GroupShuffleSplit(n_splits=1, test_size=APART_SHARE, random_state=seed)
    kept, apart = next(lot.split(rows, groups=groups))
    check_classes(table.labels[rows[kept]], "rows that are left to be fitted on beside the calibration split")
    return rows[kept], rows[apart]
