"""Cases for the kernels, and their oracle: the whole map in float64, which shares no line with what is tested.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

triton = pytest.importorskip("triton")  # an extra

from lapwing_detector import kernels  # noqa: E402
from lapwing_detector.kernels import attending, columns, language  # noqa: E402
from lapwing_detector.kernels.tiles import Tile, Tiles  # noqa: E402

COMPILED = isinstance(language.product, triton.JITFunction)

SMALL = Tiles(Tile(16, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 16, 4, 2))
"""Blocks so small that 37 rows have full ones, ones on the diagonal, and a rest."""

EXACT = 1e-5
"""Sums of kernels against float64: both start from the same numbers, and sums are float32 whatever the data type."""

ROUNDED = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Output: it and the weights within a block are rounded to the data type, once each, at values up to 4."""

SCALE = 0.6
"""Larger than usual, so that attention is not flat and a mechanism that is left out shows."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """To be imported where kernels run: small blocks, and NaN in memory that was asked for and not written."""
    if COMPILED and DEVICE.type == "cpu":
        pytest.fail("triton was imported before TRITON_INTERPRET=1 was set; tests/conftest.py is where to set it")
    monkeypatch.setattr(attending, "tiles_for", lambda query: SMALL)
    monkeypatch.setattr(columns, "SCAN", 32)
    monkeypatch.setattr(kernels, "INTERPRETED", DEVICE.type == "cpu")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """The arguments of `attend`."""

    query: Tensor
    key: Tensor
    value: Tensor
    first: int
    scaling: float = SCALE
    starts: Tensor | None = None
    counted: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def without(self, *names: str) -> Case:
        return replace(self, **dict.fromkeys(names))

    @property
    def options(self) -> dict[str, Any]:
        names = ("first", "scaling", "starts", "counted", "softcap", "sinks")
        return {name: getattr(self, name) for name in names}


def case(
    rows: int,
    first: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    width: int = 12,
    value_width: int = 6,
    heads: int = 2,
    shared: int = 1,
    window: int | None = None,
    left: tuple[int, int] | None = None,
    right: tuple[int, int] | None = None,
    sinks: bool = False,
    softcap: float | None = None,
) -> Case:
    """Two sequences of random numbers; left and right are how much of each is padding."""
    generator = torch.Generator().manual_seed(rows + first)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    # (batch, rows, heads, width) is how models lay them out; keys lie in a cache that has room for more. The room
    # holds NaN, which would spread to everything if it were read.
    query = numbers(2, rows, heads, width).transpose(1, 2)
    key, value = (
        torch.cat([numbers(2, shared, first + rows, size), numbers(2, shared, 9, size) * torch.nan], dim=2)
        for size in (width, value_width)
    )
    own = first + torch.arange(rows, device=DEVICE).expand(2, rows)
    starts = counted = None
    if window is not None or left is not None:
        padding = torch.tensor(left or (0, 0), device=DEVICE)[:, None]
        starts = torch.maximum(own - (window or first + rows) + 1, padding).int()
        counted = own >= padding if left is not None else None
    if right is not None:
        counted = own < first + rows - torch.tensor(right, device=DEVICE)[:, None]
    return Case(
        query,
        key[:, :, : first + rows],
        value[:, :, : first + rows],
        first,
        starts=starts,
        counted=counted,
        softcap=softcap,
        sinks=1 + numbers(heads) if sinks else None,
    )


def expected(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Output (batch, rows, heads, value width), diagonal and received of all heads, by the book."""
    query, key, value = case.query.double(), case.key.double(), case.value.double()
    rows, columns = query.shape[2], key.shape[2]
    own = case.first + torch.arange(rows, device=DEVICE)
    at = torch.arange(columns, device=DEVICE)
    group = query.shape[1] // key.shape[1]
    of_head = torch.arange(query.shape[1], device=DEVICE) // group
    scores = torch.einsum("bhrw,bhcw->bhrc", query, key[:, of_head]) * case.scaling
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    sees = (at <= own[:, None]).expand(2, rows, columns)
    if case.starts is not None:
        sees = sees & (at >= case.starts[..., None])
    powers = scores.exp() * sees[:, None]
    total = powers.sum(-1, keepdim=True)
    if case.sinks is not None:
        total = total + case.sinks.double().exp()[:, None, None]
    maps = torch.where(total > 0, powers / total, 0.0)
    output = torch.einsum("bhrc,bhcw->brhw", maps, value[:, of_head])
    counts = maps if case.counted is None else maps * case.counted[:, None, :, None]
    return output, maps[..., torch.arange(rows, device=DEVICE), own], counts.sum(2)


def attended(case: Case, heads: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.attend(case.query, case.key, case.value, **case.options, heads=heads)


def error(of: Case, against: Case | None = None, heads: list[int] | None = None) -> float:
    """Largest difference of the diagonal, and of the sums relative to those above 1; `against` is the truth."""
    truth = against or of
    listed = None if heads is None else torch.tensor(heads, dtype=torch.int32, device=DEVICE)
    output, *sums = attended(of, listed)
    right, *right_sums = expected(truth)
    worst = 0.0
    for one, other in zip(sums, right_sums, strict=True):
        assert one.dtype == torch.float32
        other = other if heads is None else other[:, heads]
        assert one.shape == other.shape
        worst = max(worst, _largest((one - other) / other.abs().clamp(min=1)))
    assert output.shape == right.shape
    assert output.dtype == of.value.dtype
    if against is None:
        assert _largest(output - right) < ROUNDED[of.value.dtype]
    return worst


def _largest(difference: Tensor) -> float:
    return float(difference.abs().nan_to_num(nan=torch.inf).max())
