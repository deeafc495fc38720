"""Attention in pieces of every size, without and with memory used again, against the whole map in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lapwing_detector import native, strips
from lapwing_detector.attention import attend
from lapwing_detector.forward import first_seen
from lapwing_detector.scratch import Scratch

pytestmark = pytest.mark.usefixtures("two_threads")

SAME = 2e-6
"""Float32 sums of at most 90 attentions, each rounded at 6e-8."""

BATCH, HEADS, SHARED, WIDTH = 4, 6, 3, 8

PIECES = {
    "a key-value head at a time": {"TOGETHER_BYTES": 1, "STRIP_BYTES": 4 * 2 * 32 * 90},
    "some key-value heads": {"TOGETHER_BYTES": 4 * 2 * 16 * 90 * 2, "MOST_ROWS": 16, "LEAST_ROWS": 1},
    "some sequences": {"TOGETHER_BYTES": 4 * 2 * 16 * 90 * 6, "MOST_ROWS": 16, "LEAST_ROWS": 1},
    "rows one by one": {"STRIP_BYTES": 1},
    "everything": {},
}


@dataclass(frozen=True)
class Case:
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    counted: Tensor | None
    starts: Tensor | None
    sinks: Tensor | None
    first: int


def case(kind: str, rows: int, first: int = 0, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int, tokens: int) -> Tensor:  # laid out as projections give them: heads within tokens
        return torch.randn(BATCH, tokens, heads, WIDTH, generator=generator).transpose(1, 2)

    columns = first + rows
    own, seen = torch.arange(first, columns)[:, None], torch.arange(columns)
    causal = (seen <= own)[None, None].expand(BATCH, 1, rows, columns)
    mask, counted = None, None
    if kind == "window":
        mask = causal & (seen > own - 7)
    elif kind == "left":  # of another length in every sequence
        padding = torch.tensor([0, 3, 9, 1])
        counted = torch.arange(first, columns) >= padding[:, None]
        mask = causal & (seen >= padding[:, None, None, None])
    elif kind == "by head":
        mask = (causal & (torch.rand(BATCH, HEADS, rows, columns, generator=generator) < 0.7)) | (seen == own)
    starts = None
    if mask is not None and kind != "by head":
        visible = mask.diagonal(offset=first, dim1=-2, dim2=-1).any(dim=1)
        starts = first_seen(mask, visible, first)
        assert starts is not None
    sinks = torch.randn(HEADS, generator=generator) if kind == "sinks" else None
    return Case(
        random(HEADS, rows), random(SHARED, columns), random(SHARED, columns), mask, counted, starts, sinks, first
    )


KINDS = ("plain", "window", "left", "by head", "sinks")


def whole(of: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The same three from the whole map in float64; written without a look at how `attend` goes about it."""
    group = HEADS // SHARED
    query, key, value = of.query.double(), of.key.double(), of.value.double()
    scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * 0.3
    rows, columns = scores.shape[-2:]
    hidden = torch.ones(rows, columns, dtype=torch.bool).triu(of.first + 1)
    scores = scores.masked_fill(hidden if of.mask is None else ~of.mask, -torch.inf)
    if of.sinks is not None:
        extra = of.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], -1)
    maps = scores.softmax(-1)[..., :columns].nan_to_num(0.0)
    counted = maps if of.counted is None else maps * of.counted[:, None, :, None]
    output = (maps @ value.repeat_interleave(group, 1)).transpose(1, 2)
    return output, maps.diagonal(offset=of.first, dim1=-2, dim2=-1), counted.sum(-2)


def error(of: Case, scratch: Scratch | None) -> float:
    found = attend(
        of.query,
        of.key,
        of.value,
        mask=of.mask,
        first=of.first,
        counted=of.counted,
        starts=of.starts,
        sinks=of.sinks,
        scaling=0.3,
        scratch=scratch,
    )
    counts = slice(None) if of.counted is None else of.counted
    differences = [
        (found[0] - (expected := whole(of))[0])[counts],
        (found[1] - expected[1]).transpose(1, 2)[counts],
        (found[2] - expected[2]) / 10,  # a sum of many
    ]
    return max(float(one.abs().max()) for one in differences)


@pytest.fixture(autouse=True)
def _by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)


@pytest.fixture(params=PIECES)
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, size in PIECES[request.param].items():
        monkeypatch.setattr(strips, name, size)
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients", [False, True], ids=["scratch", "gradients"])
def test_pieces_of_every_size(pieces: str, kind: str, gradients: bool) -> None:
    scratch = Scratch()
    # Growing and shrinking shapes over the same memory; a text that goes on behind its cache.
    for rows, first in ((90, 0), (33, 0), (64, 26), (2, 5), (90, 0)):
        of = case(kind, rows, first)
        with torch.set_grad_enabled(gradients):
            query = of.query.clone().requires_grad_(gradients)
            assert error(replace(of, query=query), scratch) < SAME


def test_the_pieces_are_what_they_are_called(pieces: str) -> None:
    plan = list(strips.strips(BATCH, HEADS, SHARED, 90, first=0, starts=None, clean=True, cached=True))
    heads = {strip.shared.stop - strip.shared.start for strip in plan}
    sequences = {strip.batch.stop - strip.batch.start for strip in plan}
    rows = {strip.rows.stop - strip.rows.start for strip in plan}
    assert {
        "a key-value head at a time": heads == {1} and sequences == {1},
        "some key-value heads": heads == {2, 1} and sequences == {1},
        "some sequences": heads == {SHARED} and sequences == {2},
        "rows one by one": rows == {1},
        "everything": heads == {SHARED} and sequences == {BATCH} and rows == {90},
    }[pieces]


def test_off_the_cpu_pieces_are_large() -> None:
    plan = list(strips.strips(1, 32, 8, 8192, first=0, starts=None, clean=True, cached=False))
    assert len(plan) == 8 * 8192 // (strips.STRIP_BYTES // (4 * 4 * 8192))


def test_what_a_strip_keeps_is_bounded_however_long_the_text() -> None:
    for columns in (1024, 16384, 131072):
        for strip in strips.strips(8, 32, 8, 512, first=columns - 512, starts=None, clean=True, cached=True):
            maps = (strip.batch.stop - strip.batch.start) * (strip.heads.stop - strip.heads.start)
            assert 4 * maps * (strip.rows.stop - strip.rows.start) * columns <= strips.STRIP_BYTES


def test_control_heads_of_another_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "TOGETHER_BYTES", 1)
    monkeypatch.setattr(strips, "STRIP_BYTES", 4 * 2 * 32 * 40)
    real = strips.strips

    def shifted(*args: int, **options: object):  # type: ignore[no-untyped-def]
        for strip in real(*args, **options):  # type: ignore[arg-type]
            next_one = (strip.shared.start + 1) % SHARED
            yield replace(strip, shared=slice(next_one, next_one + 1))

    monkeypatch.setattr("lapwing_detector.attention.strips", shifted)
    assert error(case("plain", 40), Scratch()) > 0.01


@pytest.mark.parametrize("kind", ["window", "left"])
def test_control_starts_that_are_too_late(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "LEAST_ROWS", 1)
    monkeypatch.setattr(strips, "MOST_ROWS", 4)
    of = case(kind, 60)
    assert of.starts is not None
    with torch.no_grad():
        assert error(of, Scratch()) < SAME
        late = torch.minimum(of.starts + 3, torch.arange(60, dtype=torch.int32))
        assert error(replace(of, starts=late), Scratch()) > 0.01


def test_rows_that_see_nothing_spread_no_nan() -> None:
    of = case("left", 12)
    with torch.no_grad():
        for starts in (of.starts, None):
            found = attend(
                of.query, of.key, of.value, mask=of.mask, first=0, counted=of.counted, starts=starts, scaling=0.5
            )
            assert all(bool(part.isfinite().all()) for part in found)


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_rounds_the_output_and_no_sum(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapwing_detector.attention._multiplies", lambda dtype, device: native)
    of = case("plain", 70)
    rounded = replace(of, query=of.query.bfloat16(), key=of.key.bfloat16(), value=of.value.bfloat16())
    with torch.no_grad():
        found = attend(rounded.query, rounded.key, rounded.value, mask=None, first=0, counted=None, scaling=0.3)
    output, diagonal, received = whole(rounded)
    assert found[0].dtype == torch.bfloat16
    roundings = 1 + native  # of the output, and of the attention before
    assert float((found[0] - output).abs().max()) < roundings * 2**-9 * float(rounded.value.abs().max())
    assert float((found[1] - diagonal).abs().max()) < SAME
    assert float((found[2] - received).abs().max()) < 10 * SAME  # a sum of many
    coarse = whole(of)
    assert float((found[2] - coarse[2]).abs().max()) > 100 * SAME  # control: what rounding would do to the map
