"""Attends for one layer and adds its rows to the sums: by kernels on a GPU, in C on a CPU, by torch elsewhere.

Knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lapwing_detector import kernels, native
from lapwing_detector.attention import attend
from lapwing_detector.forward import Place
from lapwing_detector.layers import AttentionLayer
from lapwing_detector.scratch import Scratch
from lapwing_detector.sequences import Sequences


class Reader:
    """Keeps between calls what layers can use again. Not for several threads."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._indices: dict[tuple[int, torch.device], Tensor] = {}

    def read(
        self,
        sequences: Sequences,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Place,
        mechanism: dict[str, Any],
    ) -> Tensor:
        """Attention of new rows, which are added to the sums of the layer.

        Args:
            sequences: where the sums are.
            layer: whose attention it is; one that is not kept is only attended for.
            query: (batch, heads, rows, width).
            key: (batch, key-value heads, keys, width).
            value: (batch, key-value heads, keys, value width).
            place: where the rows lie.
            mechanism: scaling, softcap and sinks, as for `attend`.

        Returns:
            (batch, rows, heads, value width).
        """
        if place.columns < key.shape[2]:
            key, value = key[:, :, : place.columns], value[:, :, : place.columns]
        counted = None if place.counted is None else place.counted.to(query.device)
        by_intervals = place.mask is None or place.starts is not None
        # Looked at first: every layer of every step of decoding comes here, and the rest would be 1 % of a small model.
        if by_intervals and _newest_in_c(query, key, value, mechanism):
            sums = sequences.open_row(layer, place.tokens)
            if sums is not None:
                output = native.attend_row(
                    query,
                    key,
                    value,
                    diagonal=sums.diagonal,
                    received=sums.received,
                    tokens=place.tokens,
                    starts=place.starts,
                    counted=counted,
                    scaling=mechanism["scaling"],
                    heads=self._heads(sequences, layer, query),
                    scratch=self._scratch,
                )
                sequences.summed.add(layer.index)
                return output
        rows = {"starts": place.starts, "counted": counted, **mechanism}
        if by_intervals and kernels.available(query.device) and kernels.supports(query, key, value):
            return self._by_kernels(sequences, layer, query, key, value, place, rows)
        output, diagonal, received = attend(
            query, key, value, mask=place.mask, first=place.first, scratch=self._scratch, **rows
        )
        sequences.add(layer, diagonal, received, place.tokens)
        return output

    def clear(self) -> None:
        """Gives the memory back, but for the few numbers that would have to go to the device again."""
        self._scratch.clear()

    def _by_kernels(
        self,
        sequences: Sequences,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        place: Place,
        rows: dict[str, Any],
    ) -> Tensor:
        heads, tokens = self._heads(sequences, layer, query), place.tokens
        sums = sequences.open_row(layer, tokens) if query.shape[2] == 1 else None
        if sums is not None:
            diagonal = sums.diagonal[:, :, tokens - 1 : tokens]
            received = sums.received[:, :, tokens - key.shape[2] : tokens]
            output = kernels.attend_row(query, key, value, diagonal=diagonal, received=received, heads=heads, **rows)
            sequences.summed.add(layer.index)
            return output
        output, diagonal, received = kernels.attend(query, key, value, first=place.first, heads=heads, **rows)
        if sequences.keeps(layer):
            sequences.add_kept(layer, query.shape[1], diagonal, received, tokens)
        return output

    def _heads(self, sequences: Sequences, layer: AttentionLayer, query: Tensor) -> Tensor | None:
        """(heads read,) int32: heads that are not kept cost nothing; None for all of them."""
        if sequences.kept is None:
            return None
        place = layer.index, query.device  # to which the model may have been moved since
        if place not in self._indices:
            kept = sequences.kept_of(layer, query.shape[1]) or [0]  # the kernels read one at least
            self._indices[place] = torch.tensor(kept, dtype=torch.int32, device=query.device)
        return self._indices[place]


def _newest_in_c(query: Tensor, key: Tensor, value: Tensor, mechanism: dict[str, Any]) -> bool:
    """Whether this is one row, of attention that `native.attend_row` knows and no test asks for the kernels."""
    plain = mechanism["softcap"] is None and mechanism["sinks"] is None and not kernels.INTERPRETED
    return query.shape[2] == 1 and plain and native.supports_row(query, key, value)
