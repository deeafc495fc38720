"""Some rows of a map: what there is to know of them besides queries, keys and values. Knows no Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Which columns each row sees, which rows count, and what becomes of a score."""

    first: int
    """Column of the first row's own token; row j is column first + j, and the last row is the last column."""

    starts: Tensor | None
    """(batch, rows) int32, the first column that a row sees of those up to its own; None: all of them."""

    counted: Tensor | None
    """(batch, rows) bool, the rows that take part in column sums; None: all."""

    scaling: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether a softmax over all columns up to a row's own is all there is."""
        return self.starts is None and self.softcap is None and self.sinks is None

    def packed(self, batch: int, rows: int) -> Rows:
        """With tensors as kernels read them: of the right type, and without gaps."""
        starts, counted = self.starts, self.counted
        if starts is not None:
            starts = starts.to(torch.int32).expand(batch, rows).contiguous()
        if counted is not None:
            counted = counted.expand(batch, rows).contiguous()
        return Rows(self.first, starts, counted, self.scaling, self.softcap, self.sinks)
