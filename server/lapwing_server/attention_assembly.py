"""The sums of one sequence, put together from the slices of a stream. Knows no gRPC and no event loop.

Only heads that some probe reads are held and looked at; of all others the slices' shapes and order count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from lapwing.v1 import detector_pb2, tensor_pb2
from lapwing_detector.features import FEATURES
from lapwing_detector.probe import Probe
from lapwing_detector.summary import AttentionSummary
from lapwing_server.attention_doubts import Doubt, rows_doubts, summary_doubts
from lapwing_server.attention_header import Header
from lapwing_server.attention_order import Order, Place
from lapwing_server.attention_slices import Numbers, Sums, is_half, read_tensor, rows_sums, summary_sums
from lapwing_server.attention_sums import TOKEN_BYTES, HeldSums
from lapwing_server.refusal import invalid

FLOAT32 = (tensor_pb2.DATA_TYPE_FLOAT32,)
FLOATS = (tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_FLOAT16)


class Assembly:
    """What has come of one sequence. Not for several threads.

    Args:
        header: of the stream.
        probe: whose heads must come whole.
        shadows: further probes; where the heads of one do not come or are not sound, it alone has no score.
        most_bytes: that the sums may take.
        hold: asked before the sums take so many bytes in all; raises Refusal where all streams together take too many.

    Raises:
        Refusal: the tokens that the header declares would take more.
    """

    def __init__(
        self,
        header: Header,
        probe: Probe,
        shadows: Iterable[Probe] = (),
        *,
        most_bytes: int,
        hold: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self._header = header
        self._probe = probe
        self._order = Order(header)
        self._needed, held = self._mask([probe]), self._mask([probe, *shadows])
        """(layers, heads): those of the probe itself, and those of all."""

        self._places = np.full(held.shape, -1)
        self._places[held] = np.arange(held.sum())
        """(layers, heads): place among the held ones; -1 for heads that nobody reads."""

        self._coarse = False
        """Whether what is below 6e-8 was lost on the way."""

        self._sums = HeldSums(int(held.sum()), header.most_tokens, most_bytes, header.declared, hold)
        self._require_room(self._least_tokens, self._least_field)

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return self._sums.nbytes

    def add_summary(self, message: detector_pb2.AttentionSummarySlice) -> None:
        """Adds sums over rows.

        Raises:
            Refusal: they are not the next ones, or can't be of an attention map; nothing of them was added.
        """
        diagonal = read_tensor(message.diagonal, 3, FLOAT32, "summary.diagonal")
        received = read_tensor(message.received, 3, FLOAT32, "summary.received")
        place = self._order.place(message, "summary", received, "received")
        self._require_room(place.tokens, "summary.received")
        expected = (*received.shape[:2], place.tokens - place.first_token)
        if diagonal.shape != expected:
            shapes = f"is {list(diagonal.shape)}; by first_token and received it must be {list(expected)}"
            raise invalid("summary.diagonal.shape", shapes)
        sums = summary_sums(*(self._picked(array, place) for array in (diagonal, received)))
        self._add(place, sums, summary_doubts(sums, place.first_token, self._header.rules))

    def add_rows(self, message: detector_pb2.AttentionRowsSlice) -> None:
        """Adds whole rows; raises like `add_summary`."""
        weights = read_tensor(message.weights, 4, FLOATS, "rows.weights")
        place = self._order.place(message, "rows", weights, "weights")
        self._require_room(place.tokens, "rows.weights")
        rows, columns = weights.shape[2], place.first_token + weights.shape[2]
        if place.tokens != columns:
            shape = f"is {list(weights.shape)}; {place.first_token} and {rows} rows make {columns} columns"
            raise invalid("rows.weights.shape", shape)
        diagonal = self._diagonal_of(message, weights)
        kept = self._picked(weights, place), None if diagonal is None else self._picked(diagonal, place)
        doubts = rows_doubts(*kept, place.first_token, self._header.rules)
        self._add(place, rows_sums(*kept, place.first_token), doubts)
        self._coarse |= diagonal is None and is_half(weights.dtype)

    def tokens(self, field: str) -> int:
        """How far all heads of the probe have come.

        Raises:
            Refusal: not equally far; `field` is to blame.
        """
        return self._order.tokens(self._needed, field)

    def require_whole(self) -> int:
        """All tokens that were declared must have come; returns how many.

        Raises:
            Refusal: something is missing. A part of a response has no score that may be taken for that of the whole.
        """
        if not self._order.part:
            raise invalid("part", "no attention came; send summary or rows after the header", "EMPTY_STREAM")
        tokens = self.tokens(self._order.part)
        if tokens < self._least_tokens:
            message = f"{self._least_tokens} tokens were to come, {tokens} came before the stream ended"
            raise invalid(self._least_field, message, "INCOMPLETE")
        return tokens

    def summary(self, probe: Probe, tokens: int) -> AttentionSummary | None:
        """What came of the heads that a probe reads, NaN in all others; None where not all of it came and is sound.

        Args:
            probe: one of those that the assembly was made for.
            tokens: how many.
        """
        layers, mask = self._header.layers, self._mask([probe])
        if not set(probe.heads) <= set(layers) or not self._order.reached(mask, tokens):
            return None
        if self._coarse and takes_logarithms(probe):
            return None
        rows = [layers.index(layer) for layer in probe.heads]
        selected = mask[rows]
        diagonal, received = (np.full((*selected.shape, tokens), np.nan, np.float32) for _ in range(2))
        diagonal[selected], received[selected] = self._sums.take(self._places[rows][selected], tokens)
        if np.isnan(received[selected]).any():
            return None
        return AttentionSummary(diagonal, received, tuple(probe.heads))

    @property
    def _least_tokens(self) -> int:
        """Tokens that the header declares, of the prompt at least."""
        return self._header.prompt_tokens if self._header.declared is None else self._header.declared

    @property
    def _least_field(self) -> str:
        return "header.prompt_tokens" if self._header.declared is None else "header.response_tokens"

    def _mask(self, probes: Iterable[Probe]) -> NDArray[np.bool_]:
        """(layers, heads): which heads the probes read."""
        layers = self._header.layers
        mask = np.zeros((len(layers), self._header.heads), bool)
        for probe in probes:
            for layer, heads in probe.heads.items():
                if layer in layers:
                    mask[layers.index(layer), list(heads)] = True
        return mask

    def _require_room(self, tokens: int, field: str) -> None:
        """Refuses what would take too much, before it is taken."""
        if tokens > self._sums.most_tokens:
            size = self._sums.heads * tokens * TOKEN_BYTES
            message = f"{self._sums.heads} heads of {tokens} tokens take {size} bytes here"
            room = f"there is room for {self._sums.most_tokens} tokens, score a shorter text"
            raise invalid(field, f"{message}; {room}", "TOO_LARGE")

    def _diagonal_of(self, message: detector_pb2.AttentionRowsSlice, weights: Numbers) -> Numbers | None:
        """The diagonal that comes beside rows; None where it need not, and does not."""
        if not message.HasField("diagonal"):
            if is_half(weights.dtype) and takes_logarithms(self._probe):
                reason = "float16 loses what is below 6e-8, and the probe takes logarithms"
                raise invalid("rows.diagonal", f"is missing: {reason}; send the diagonal in float32, or all of it")
            return None
        diagonal = read_tensor(message.diagonal, 3, FLOAT32, "rows.diagonal")
        if diagonal.shape != weights.shape[:3]:
            shapes = f"is {list(diagonal.shape)}, that of the weights' rows {list(weights.shape[:3])}"
            raise invalid("rows.diagonal.shape", shapes)
        return diagonal

    def _held(self, place: Place) -> NDArray[np.intp]:
        """(layers * heads of the slice,): their places among the held heads, -1 for those that nobody reads."""
        return self._places[place.layers, place.heads].ravel()

    def _picked(self, values: Numbers, place: Place) -> Numbers:
        """(held heads of the slice, ...) of (layers, heads, ...)."""
        return values.reshape(-1, *values.shape[2:])[self._held(place) >= 0]

    def _add(self, place: Place, sums: Sums, doubts: Iterable[Doubt]) -> None:
        held = self._held(place)
        heads = held[held >= 0]
        needed = self._needed[place.layers, place.heads].ravel()[held >= 0]
        unsound = np.zeros(len(heads), bool)
        with np.errstate(all="ignore"):
            for doubt in doubts:
                broken = doubt.broken.reshape(len(heads), -1).any(axis=1) if len(heads) else unsound
                if (broken & needed).any():
                    name = self._order.name(*np.argwhere(self._places == heads[broken & needed][0])[0])
                    raise invalid(doubt.field, f"{name}: {doubt.message}", doubt.reason)
                unsound |= broken
            self._sums.add(heads, place.first_token, sums, unsound)
        self._order.advance(place)


def takes_logarithms(probe: Probe) -> bool:
    """Whether small weights of the diagonal matter to it."""
    return any(not FEATURES[feature].ranked for feature in probe.features)
