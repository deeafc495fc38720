"""Sums that grow token by token, and what a probe says of them when they are read at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from lapwing_detector.errors import TooShort
from lapwing_detector.features import FEATURES
from lapwing_detector.layers import AttentionLayer
from lapwing_detector.probe import Probe
from lapwing_detector.sequences import Sequences
from lapwing_detector.summary import AttentionSummary
from tests.detector.probes import random_maps, random_probe

LAYERS, HEADS = 3, 4  # as the tiny models

SAME_SUMS = 2e-6
"""r_i * (1 / (T - i)) and r_i / (T - i) are one or two roundings of 6e-8 apart, in about 100 numbers whose weights
are of order one."""


def a_probe(features: tuple[str, ...] = tuple(FEATURES), k: int = 3, **changes: object) -> Probe:
    return replace(random_probe(LAYERS, HEADS, k, features, seed=k), **changes)


def said(probe: Probe, summary: AttentionSummary) -> float | None:
    """The oracle: NumPy's sort of all values."""
    try:
        return probe.score(summary)[0]
    except TooShort:
        return None


def require_same(found: list[float | None], expected: list[float | None], tolerance: float) -> None:
    assert [one is None for one in found] == [one is None for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one is None or one == pytest.approx(other, abs=tolerance)


@dataclass
class Summed:
    """Stands in for a capture."""

    sums: Sequences


def growing(probe: Probe, tokens: int, first: int) -> Iterator[Summed]:
    """The sums of random maps in the probe's heads: of the first tokens, and again after each further one."""
    maps = torch.from_numpy(random_maps(LAYERS, HEADS, tokens)).float()
    layers = tuple(AttentionLayer(index, f"layers.{index}", nn.Identity()) for index in probe.heads)
    sequences = Sequences(layers, probe.heads)
    for start, stop in [(0, first), *((at, at + 1) for at in range(first, tokens))]:
        for layer in layers:
            rows = maps[layer.index, list(probe.heads[layer.index]), start:stop, :stop]
            sequences.add_kept(layer, HEADS, rows.diagonal(start, 1, 2)[None].clone(), rows.sum(1)[None], stop)
        sequences.close()
        sequences.tokens = stop
        sequences.counted.add(torch.ones(1, stop - start, dtype=torch.bool))
        yield Summed(sequences)
