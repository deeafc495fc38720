"""What a capture has summed up, cut into pieces for a server that scores. Knows arrays, no wire and no model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.errors import InvalidInput
from lapwing_detector.sequences import Sequences
from lapwing_detector.summary import AttentionSummary

MAX_BYTES = 2**20
"""Of the arrays of one piece."""

NUMBER_BYTES = 4


@dataclass(frozen=True, eq=False)
class AttentionChunk:
    """What consecutive rows of the attention maps add up to, for some heads of some layers.

    Heads that the capture does not keep are NaN.
    """

    first_layer: int
    """Place in `AttentionChunks.layers` of the first layer of the arrays."""

    first_head: int
    """Index of their first head."""

    first_token: int
    """Token of the first row, from 0; the rows before it were given out earlier."""

    diagonal: NDArray[np.float32]
    """(layers, heads, rows) in [0, 1]: attention of each row's token to itself."""

    received: NDArray[np.float32]
    """(layers, heads, first_token + rows): attention that each token receives from these rows."""


@dataclass(frozen=True, eq=False)
class AttentionChunks(Collection[AttentionChunk]):
    """Consecutive rows of one sequence, as pieces that together cover every layer and head once.

    It stays as it is while the model goes on, and may be iterated again.
    """

    layers: tuple[int, ...]
    """Index in the model of each captured layer."""

    heads: int
    """Heads of each layer, kept or not."""

    first_token: int
    """Token of the first row."""

    tokens: int
    """Length of the sequence up to the last row."""

    attention_sinks: bool
    """Whether some layer has learned sinks, so that rows add up to less than 1."""

    diagonal: NDArray[np.float32] = field(repr=False)
    """(layers, heads, tokens - first_token), as in AttentionChunk."""

    received: NDArray[np.float32] = field(repr=False)
    """(layers, heads, tokens), as in AttentionChunk."""

    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        if self.max_bytes < self._head_bytes:
            raise InvalidInput(
                "max_bytes",
                f"is {self.max_bytes}; one head of {self.tokens} tokens takes {self._head_bytes}, give at least that",
            )

    def __iter__(self) -> Iterator[AttentionChunk]:
        for layers, heads in self._places():
            arrays = (np.ascontiguousarray(array[layers, heads]) for array in (self.diagonal, self.received))
            yield AttentionChunk(layers.start, heads.start, self.first_token, *arrays)

    def __len__(self) -> int:
        return len(self._places())

    def __contains__(self, chunk: object) -> bool:
        return any(chunk is one for one in self)

    @property
    def _head_bytes(self) -> int:
        return NUMBER_BYTES * (2 * self.tokens - self.first_token)

    def _places(self) -> list[tuple[slice, slice]]:
        """Layers and heads of each piece: whole layers where one fits in, else some of its heads."""
        if self.tokens == self.first_token:
            return []
        at_once = self.max_bytes // self._head_bytes
        layers = max(1, at_once // self.heads)
        heads = min(at_once, self.heads)
        return [
            (slice(layer, min(layer + layers, len(self.layers))), slice(head, min(head + heads, self.heads)))
            for layer in range(0, len(self.layers), layers)
            for head in range(0, self.heads, heads)
        ]


class Given:
    """How much of each sequence of a capture was given out already."""

    def __init__(self) -> None:
        self._sequences: Sequences | None = None
        self._received: dict[int, NDArray[np.float32]] = {}

    def rest(self, sequences: Sequences, sequence: int | None, from_start: bool, **options: int) -> AttentionChunks:
        """What was added to a sequence since the last call; all of it where the capture has begun anew since.

        Raises:
            InvalidInput: there are several sequences and none is named, or it is not among them.
            CaptureError: see `Sequences.summary`.
        """
        if sequences is not self._sequences:
            self._sequences, self._received = sequences, {}
        row = the_one(sequence, sequences.batch)
        summary = sequences.summary(row)
        before = None if from_start else self._received.get(row)
        sinks = any(getattr(layer.module, "sinks", None) is not None for layer in sequences.layers)
        chunks = AttentionChunks(
            layers=summary.layers,
            heads=summary.diagonal.shape[1],
            first_token=0 if before is None else before.shape[2],
            tokens=summary.token_count,
            attention_sinks=sinks,
            diagonal=summary.diagonal if before is None else summary.diagonal[:, :, before.shape[2] :],
            received=summary.received if before is None else increment(summary, before),
            **options,
        )
        self._received[row] = summary.received
        return chunks


def increment(summary: AttentionSummary, before: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the rows since `before` add to the column sums; (layers, heads, tokens).

    The difference of two float32 sums is taken in float64 and rounded once, by at most 2^-24 of it. As sums only grow,
    the increments of a sequence, added up in float64, stay within 2^-24 of the sum itself however many there are.

    Args:
        summary: the sums now.
        before: (layers, heads, fewer tokens) the sums then.
    """
    added = summary.received.astype(np.float64)
    added[:, :, : before.shape[2]] -= before
    return added.astype(np.float32)


def the_one(sequence: int | None, batch: int | None) -> int:
    """The place of the sequence in its batch.

    Raises:
        InvalidInput: there are several and none is named, or it is not among them.
    """
    if batch is None:
        return 0  # nothing was captured yet, which is said where the sums are read
    if sequence is None and batch > 1:
        raise InvalidInput("sequence", f"is not given, and the batch has {batch}; give one of 0 to {batch - 1}")
    if sequence is not None and not 0 <= sequence < batch:
        raise InvalidInput("sequence", f"is {sequence}; the batch has {batch}, from 0")
    return sequence or 0
