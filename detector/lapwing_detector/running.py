"""The logit of a probe after every token, from the sums of a capture that goes on. Knows no model and no tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lapwing_detector.capture import Captured
from lapwing_detector.errors import CaptureError
from lapwing_detector.features import LOG_FLOOR
from lapwing_detector.probe import Probe
from lapwing_detector.scratch import Scratch
from lapwing_detector.sequences import Sequences, Sums

CHUNK = 64
"""Tokens whose largest value is looked at first; of 32, 64 and 128 the fastest for the 10 largest of 4,096."""


class RunningLogits:
    """The logit of each sequence of a capture, as often as it is asked for while tokens come in.

        captured = capture_attention(model, heads=probe.heads)
        running = RunningLogits(probe, captured)
        for ids in (prompt, *tokens):
            with captured.resume():
                cache = model(ids, past_key_values=cache).past_key_values
            [logit] = running.logits()

    The sums stay where they are, and of every token before the newest ones no more is read than the features need.
    """

    def __init__(self, probe: Probe, captured: Captured) -> None:
        self._probe = probe
        self._captured = captured
        self._sequences: Sequences | None = None
        self._parts: list[_Part] = []
        self._columns: list[list[int]] = []
        """By sequence: the columns of its tokens, without padding and what was fed after its end."""

        self._read = 0
        """Forwards of the sequences that were read."""

        self._tokens = 0
        """Columns of these."""

    @torch.inference_mode()
    def logits(self) -> list[float | None]:
        """What `Probe.score` says of each sequence of the newest batch, from the tokens that the model was fed.

        A generated token that was not fed yet has no row in the map, and no part in the logit.

        Returns:
            For each sequence its logit; None where it is too short, or where its attention is not finite.

        Raises:
            CaptureError: nothing was captured, the last forward failed, or not the probe's heads were captured.
        """
        sequences = self._captured.sums
        if sequences is not self._sequences:
            self._start(sequences)
        if not sequences.joint:
            sequences.join(2 * sequences.tokens)
        new = self._new_columns(sequences)
        for part, sums in zip(self._parts, sequences.joint, strict=True):
            part.add(sums, new)
        return [self._logit(row, sequences.joint) for row in range(len(self._columns))]

    def _start(self, sequences: Sequences) -> None:
        heads = self._probe.heads
        if sequences.batch is None:
            raise CaptureError("nothing was captured yet; run the model inside the context before asking for logits")
        if heads and sequences.kept != heads:
            raise CaptureError(
                f"the capture does not keep the heads that the probe {self._probe.name!r} reads, and them only; "
                "make it by capture_attention(model, heads=probe.heads)"
            )
        batch = sequences.batch
        self._sequences, self._read, self._tokens = sequences, 0, 0
        self._columns = [[] for _ in range(batch)]
        owners = [sequences.sums[layer].diagonal.device for layer, of_layer in heads.items() for _ in of_layer]
        weights = torch.from_numpy(self._probe.weights[self._probe.selected])  # (heads, width), in the order of joint
        self._parts = [
            _Part(self._probe, weights[[owner == device for owner in owners]].to(device), batch)
            for device in dict.fromkeys(owners)
        ]

    def _new_columns(self, sequences: Sequences) -> list[list[int]]:
        """By sequence: the columns of the tokens that came since the last call."""
        batch = len(self._columns)
        new: list[list[int]] = [[] for _ in range(batch)]
        for counted in sequences.counted[self._read :]:
            for row, flags in enumerate(counted.tolist()):
                new[row] += [self._tokens + place for place, counts in enumerate(flags) if counts]
            self._tokens += counted.shape[1]
        self._read = len(sequences.counted)
        for known, more in zip(self._columns, new, strict=True):
            known += more
        return new

    def _logit(self, row: int, joint: list[Sums]) -> float | None:
        columns = self._columns[row]
        if len(columns) < self._probe.needed_tokens:
            return None
        shares = [part.share(sums, row, columns) for part, sums in zip(self._parts, joint, strict=True)]
        logit = self._probe.bias + sum(float(share) for share in shares)
        return logit if math.isfinite(logit) else None


class _Part:
    """The heads that are on one device, of all sequences."""

    def __init__(self, probe: Probe, weights: Tensor, batch: int) -> None:
        precise = torch.float32 if weights.device.type == "mps" else torch.float64  # which has no float64
        self.weights = weights.to(precise)  # (heads, width)
        workspace = Workspace(weights.device)
        self.features = [
            [RUNNING[id](probe.k, weights.shape[0], precise, workspace) for id in probe.features] for _ in range(batch)
        ]

    def add(self, sums: Sums, new: list[list[int]]) -> None:
        """Read the diagonal of new tokens, by sequence their columns."""
        for row, columns in enumerate(new):
            if columns:
                diagonal = sums.diagonal[row][:, _index(columns)]
                for feature in self.features[row]:
                    feature.add(diagonal)

    def share(self, sums: Sums, row: int, columns: list[int]) -> Tensor:
        """What the heads add to the logit of a sequence; (), not finite where its attention is not."""
        index = _index(columns)
        diagonal, received = sums.diagonal[row][:, index], sums.received[row][:, index]  # (heads, tokens)
        values = torch.cat([feature.values(diagonal, received) for feature in self.features[row]], dim=-1)
        # a_ii is part of r_i, so this notices what no feature looks at: such a sequence is not to be scored.
        return (values * self.weights).sum() + 0 * received.sum()


def _index(columns: list[int]) -> slice | list[int]:
    """A slice copies nothing; there is one unless padding or an end lies in between."""
    first, last = columns[0], columns[-1]
    return slice(first, last + 1) if last - first + 1 == len(columns) else columns


# The features, as they go on.


class Workspace:
    """Memory for what is computed anew after every token; one for each device."""

    def __init__(self, device: torch.device) -> None:
        self.scratch = Scratch()
        self._ramp = torch.empty(0, device=device)

    def reciprocals(self, tokens: int) -> Tensor:
        """(tokens,): 1 / (T - i), the last one 1."""
        if len(self._ramp) < tokens:
            self._ramp = torch.arange(2 * tokens, 0, -1, dtype=torch.float32, device=self._ramp.device).reciprocal()
        return self._ramp[len(self._ramp) - tokens :]

    def chunks(self, heads: int, tokens: int) -> Tensor:
        """(heads, chunks, CHUNK) float32 with room for the values of so many tokens; smaller than any behind them."""
        count = -(-tokens // CHUNK)
        chunks = self.scratch.take("chunks", (heads, count, CHUNK), self._ramp)
        chunks.view(heads, -1)[:, tokens:] = -math.inf
        return chunks


class Running(Protocol):
    """One feature of one sequence."""

    def add(self, diagonal: Tensor) -> None:
        """Take the diagonal of new tokens, (heads, new tokens)."""

    def values(self, diagonal: Tensor, received: Tensor) -> Tensor:
        """(heads, width) from the sums of all tokens, (heads, tokens) each; there are enough of them."""


@dataclass
class MeanLog:
    """AttnScore: the log of what is on the diagonal stays there."""

    total: Tensor
    """(heads,): of the logs."""

    tokens: int = 0

    def add(self, diagonal: Tensor) -> None:
        self.total += diagonal.clamp(min=LOG_FLOOR).log().sum(dim=-1, dtype=self.total.dtype)
        self.tokens += diagonal.shape[1]

    def values(self, diagonal: Tensor, received: Tensor) -> Tensor:
        return (self.total / self.tokens)[:, None]


@dataclass
class LargestDiagonal:
    """AttnEigvals: a new token either is among the k largest or will never be."""

    k: int
    best: Tensor
    """(heads, at most k), descending."""

    def add(self, diagonal: Tensor) -> None:
        both = torch.cat([self.best, diagonal], dim=-1)
        self.best = both.topk(min(self.k, both.shape[1])).values

    def values(self, diagonal: Tensor, received: Tensor) -> Tensor:
        return self.best


@dataclass
class LargestReceived:
    """SinkProbe and LapEigvals: every value changes with every token, since its denominator T - i does."""

    k: int
    laplacian: bool
    """The diagonal is taken off."""

    workspace: Workspace = field(repr=False)

    def add(self, diagonal: Tensor) -> None:
        pass

    def values(self, diagonal: Tensor, received: Tensor) -> Tensor:
        heads, tokens = received.shape
        chunks = self.workspace.chunks(heads, tokens)
        values = chunks.view(heads, -1)[:, :tokens]
        torch.mul(received, self.workspace.reciprocals(tokens), out=values)
        if self.laplacian:
            values -= diagonal
        return largest(chunks, self.k)


def largest(chunks: Tensor, k: int) -> Tensor:
    """The k largest numbers of each head, descending; NaN counts as the largest, so that it is not overlooked.

    Args:
        chunks: (heads, chunks, size), contiguous.
        k: at most chunks * size.

    Returns:
        (heads, k).
    """
    heads, count, size = chunks.shape
    if count > k:
        places = candidates(chunks, k) + torch.arange(0, heads * count, count, device=chunks.device)[:, None]
        chunks = chunks.view(-1, size).index_select(0, places.view(-1))  # (heads * k, size); `gather` takes 7 x as long
    return chunks.view(heads, -1).topk(k).values


def candidates(chunks: Tensor, k: int) -> Tensor:
    """The k chunks of each head with the largest maxima: the k largest numbers are all in them.

    Returns:
        (heads, k) in no order.
    """
    return chunks.amax(dim=-1).topk(k, sorted=False).indices


RUNNING: dict[str, Callable[[int, int, torch.dtype, Workspace], Running]] = {
    "attention_score.v1": lambda k, heads, precise, space: MeanLog(space.reciprocals(1).new_zeros(heads, dtype=precise)),
    "attention_eigenvalues.v1": lambda k, heads, precise, space: LargestDiagonal(k, space.reciprocals(1).new_empty(heads, 0)),
    "laplacian_eigenvalues.v1": lambda k, heads, precise, space: LargestReceived(k, True, space),
    "sink_scores.v1": lambda k, heads, precise, space: LargestReceived(k, False, space),
}
"""For every feature by its id: its start, from k, the number of heads, the dtype of long sums and the memory."""
