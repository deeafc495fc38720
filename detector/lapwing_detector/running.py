"""The logit of a probe after every token, from the sums of a capture that goes on. Runs no model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from lapwing_detector.errors import CaptureError
from lapwing_detector.probe import Probe
from lapwing_detector.running_features import STARTS, Workspace
from lapwing_detector.sequences import Sequences, Sums, with_room


class Summed(Protocol):
    """What attention is summed up in: a capture, for one."""

    @property
    def sums(self) -> Sequences:
        """The sums as they stand now."""


class RunningLogits:
    """The logits of the sequences of a capture, to be asked for again and again while tokens come in.

        captured = capture_attention(model, heads=probe.heads)
        running = RunningLogits(probe, captured)
        with captured, torch.no_grad():
            for ids in (prompt, *tokens):  # (1, tokens) each
                cache = model(ids, past_key_values=cache, use_cache=True).past_key_values
                [logit] = running.logits()

    The sums stay on their device; only the logits leave it. What a probe reads beside attention has no part in them.
    """

    def __init__(self, probe: Probe, captured: Summed) -> None:
        self._probe = probe
        self._captured = captured
        self._sequences: Sequences | None = None
        self._moves = 0
        """Of their sums, those that the parts below know of; to keep the sums themselves would keep what was moved."""

        self._tokens = 0
        """The columns that were read."""

        self._columns: list[list[int]] = []
        """By sequence: the columns of its tokens, without padding and what was fed after its end."""

        self._parts: list[_Part] = []
        """One for each of `Sequences.joint`; none where the probe reads no head."""

    @torch.inference_mode()
    def logits(self) -> list[float | None]:
        """What `Probe.score` says of each sequence of the newest batch, as it stands.

        A token that was generated but not fed to the model has no row in the map, and no part in the logit.

        Returns:
            One for each sequence; None where it is too short, or its attention in the probe's heads is not finite.

        Raises:
            CaptureError: nothing was captured, the last forward failed, or the capture keeps other heads.
        """
        sequences = self._captured.sums
        if sequences is not self._sequences or sequences.moves != self._moves or not sequences.joint:
            self._start(sequences)
        new = self._new_columns(sequences)
        for part, sums in zip(self._parts, sequences.joint, strict=False):
            part.add(sums, new)
        return self._logits(sequences.joint)

    def _start(self, sequences: Sequences) -> None:
        heads, batch = self._probe.heads, sequences.batch
        if batch is None:
            raise CaptureError("nothing was captured yet; run the model inside the context, then ask for logits")
        if heads and sequences.kept != heads:
            raise CaptureError(
                f"the capture does not keep exactly the heads that the probe {self._probe.name!r} reads; "
                "make it by capture_attention(model, heads=probe.heads)"
            )
        if not sequences.joint:
            sequences.join(with_room(sequences.tokens))  # as the first token that is added would do it
        owners = [_memory(sequences.sums[layer]) for layer, of_layer in heads.items() for _ in of_layer]
        weights = torch.from_numpy(self._probe.weights[self._probe.selected])  # (heads, width), in the order of `joint`
        self._parts = [
            _Part(self._probe, weights[[one == _memory(sums) for one in owners]].to(sums.diagonal.device), batch)
            for sums in (sequences.joint if heads else ())
        ]
        self._sequences, self._moves, self._tokens = sequences, sequences.moves, 0
        self._columns = [[] for _ in range(batch)]

    def _new_columns(self, sequences: Sequences) -> list[list[int]]:
        """By sequence: the columns of its tokens that were fed since the last call."""
        counted = sequences.counted.all[:, self._tokens :].tolist()
        new = [[self._tokens + place for place, counts in enumerate(flags) if counts] for flags in counted]
        self._tokens = sequences.counted.tokens
        for known, more in zip(self._columns, new, strict=True):
            known += more
        return new

    def _logits(self, joint: list[Sums]) -> list[float | None]:
        logits: list[float | None] = [None] * len(self._columns)
        ready = {row: columns for row, columns in enumerate(self._columns) if len(columns) >= self._probe.needed_tokens}
        shares = [part.shares(sums, ready) for part, sums in zip(self._parts, joint, strict=False)]
        for place, row in enumerate(ready):
            logit = self._probe.bias + sum(of_part[place] for of_part in shares)
            logits[row] = logit if math.isfinite(logit) else None
        return logits


class _Part:
    """The probe's heads whose sums lie side by side, for all sequences of a batch."""

    def __init__(self, probe: Probe, weights: Tensor, batch: int) -> None:
        workspace, heads = Workspace(weights.device), len(weights)
        self.weights = weights.to(workspace.precise)  # (heads, width)
        self.features = [[STARTS[id](probe.k, heads, workspace) for id in probe.features] for _ in range(batch)]

    def add(self, sums: Sums, new: list[list[int]]) -> None:
        """Read the diagonal of new tokens, by sequence their columns."""
        for row, columns in enumerate(new):
            if columns:
                diagonal = sums.diagonal[row][:, _index(columns)]
                for feature in self.features[row]:
                    feature.add(diagonal)

    def shares(self, sums: Sums, ready: Mapping[int, list[int]]) -> list[float]:
        """What the heads add to the logits of some sequences, by their columns; with one transfer for all of them."""
        each = [self._share(sums, row, columns) for row, columns in ready.items()]
        return torch.stack(each).tolist() if each else []

    def _share(self, sums: Sums, row: int, columns: list[int]) -> Tensor:
        """() what the heads add to the logit of a sequence; not finite where their attention is not."""
        index = _index(columns)
        diagonal, received = sums.diagonal[row][:, index], sums.received[row][:, index]  # (heads, tokens)
        values = torch.cat([feature.values(diagonal, received) for feature in self.features[row]], dim=-1)
        # The second term is 0, or NaN where a number is that no feature reads; r_i holds a_ii, so one sum tells.
        return (values * self.weights).sum() + 0 * received.sum()


def _memory(sums: Sums) -> int:
    """Tells apart what lies side by side; the same for all views of one memory."""
    return sums.diagonal.untyped_storage().data_ptr()


def _index(columns: list[int]) -> slice | list[int]:
    """A slice, which copies nothing, unless there is padding in between."""
    first, last = columns[0], columns[-1]
    return slice(first, last + 1) if last - first + 1 == len(columns) else columns
