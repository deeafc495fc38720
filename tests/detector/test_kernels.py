"""The kernels compute the attention of the whole map in float64, whatever the shape and the mechanism."""

from __future__ import annotations

import pytest
import torch

from lapwing_detector import kernels
from lapwing_detector.attention import attend as attend_by_torch
from lapwing_detector.errors import CaptureError
from lapwing_detector.kernels import pieces
from tests.detector.kernel_cases import DEVICE, EXACT, Case, attended, case, error, expected, small_tiles

__all__ = ["small_tiles"]

MECHANISMS = {
    "plain": {},
    "window": {"window": 9},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "left padding": {"left": (0, 20)},
    "right padding": {"right": (0, 20)},
    "all": {"window": 21, "softcap": 2.0, "sinks": True, "left": (3, 0)},
}


# Many rows.


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_attention_equals_float64(mechanism: str) -> None:
    assert error(case(37, **MECHANISMS[mechanism])) < EXACT


@pytest.mark.parametrize("rows", [2, 16, 33, 49])
def test_any_number_of_rows(rows: int) -> None:
    assert error(case(rows)) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_float32_whatever_the_type(dtype: torch.dtype) -> None:
    assert error(case(20, dtype=dtype)) < EXACT
    assert error(case(37, dtype=dtype, window=9, softcap=1.5, sinks=True)) < EXACT


@pytest.mark.parametrize(("width", "value_width"), [(6, 6), (16, 16), (80, 80), (96, 64)])
def test_any_width(width: int, value_width: int) -> None:
    assert error(case(20, width=width, value_width=value_width)) < EXACT


@pytest.mark.parametrize(("heads", "shared"), [(3, 3), (4, 2), (5, 1)])
def test_any_group_of_heads(heads: int, shared: int) -> None:
    assert error(case(20, heads=heads, shared=shared)) < EXACT


@pytest.mark.parametrize("mechanism", ["plain", "window", "all"])
def test_rows_behind_a_cache(mechanism: str) -> None:
    assert error(case(18, first=37, **MECHANISMS[mechanism])) < EXACT


def test_rows_that_see_nothing_are_zero() -> None:
    # The second sequence is padding up to row 36: a whole block of either kernel, and part of one.
    padded = case(49, left=(0, 36))
    output, diagonal, received = attended(padded)
    assert output[1, :36].abs().max() == 0
    assert diagonal[1, :, :36].abs().max() == 0
    assert received[1, :, :36].abs().max() == 0
    assert error(padded) < EXACT
    assert error(case(37, left=(0, 20), sinks=True)) < EXACT


def test_padding_may_as_well_see_all_if_it_does_not_count() -> None:
    padded = case(37, left=(0, 20))
    assert padded.starts is not None
    own = torch.arange(37, device=DEVICE)
    other = Case(**{**vars(padded), "starts": torch.where(padded.starts > own, 0, padded.starts)})
    assert error(other) < EXACT
    torch.testing.assert_close(attended(other)[2], attended(padded)[2])


def test_rows_that_count_may_be_any() -> None:
    some = case(37)
    counted = torch.rand(2, 37, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.5
    assert error(Case(**{**vars(some), "counted": counted})) < EXACT


@pytest.mark.parametrize("heads", [[2], [3, 0], [1, 2, 3]])
def test_heads_that_are_read(heads: list[int]) -> None:
    assert error(case(20, heads=4, shared=2, window=9, right=(0, 4)), heads=heads) < EXACT


def test_starts_of_one_sequence_hold_for_all() -> None:
    both = case(20, window=9)
    assert both.starts is not None
    assert error(Case(**{**vars(both), "starts": both.starts[:1]})) < EXACT


def test_kernels_and_torch_agree() -> None:
    some = case(37, right=(0, 7), softcap=1.5, sinks=True)
    by_torch = attend_by_torch(some.query, some.key, some.value, mask=None, **some.options)
    for one, other in zip(attended(some), by_torch, strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


# One row.


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_one_row_equals_float64(mechanism: str) -> None:
    assert error(case(1, 37, **MECHANISMS[mechanism])) < EXACT


def test_the_first_row_of_all() -> None:
    assert error(case(1, sinks=True)) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_row_of_any_type(dtype: torch.dtype) -> None:
    assert error(case(1, 45, dtype=dtype, width=80, heads=5, shared=1)) < EXACT


@pytest.mark.parametrize("heads", [[2], [3, 0], [1, 2, 3]])
def test_heads_that_are_read_of_one_row(heads: list[int]) -> None:
    assert error(case(1, 33, heads=4, shared=2, right=(1, 0)), heads=heads) < EXACT


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("mechanism", ["left padding", "all"])
def test_pieces_of_any_length(monkeypatch: pytest.MonkeyPatch, programs: int, mechanism: str) -> None:
    monkeypatch.setattr(pieces, "PROGRAMS", programs)
    assert error(case(1, 70, **MECHANISMS[mechanism])) < EXACT


@pytest.mark.parametrize("heads", [None, [3, 1]])
def test_one_row_is_added_in_place(heads: list[int] | None) -> None:
    one = case(1, 40, heads=4, shared=2, window=30, right=(0, 1))  # the second sequence has ended
    read = list(range(4)) if heads is None else heads
    sums = torch.ones(2, len(read), 64, device=DEVICE)
    diagonals = torch.ones(2, len(read), 64, device=DEVICE)
    listed = None if heads is None else torch.tensor(heads, dtype=torch.int32, device=DEVICE)
    options = {name: value for name, value in one.options.items() if name != "first"}
    output = kernels.attend_row(
        *(one.query, one.key, one.value),
        diagonal=diagonals[..., 50:51],
        received=sums[..., 10:51],
        heads=listed,
        **options,
    )
    right, diagonal, received = expected(one)
    torch.testing.assert_close(output.double(), right, rtol=0, atol=1e-5)
    torch.testing.assert_close(diagonals[..., 50:51].double(), diagonal[:, read], rtol=0, atol=1e-6)
    torch.testing.assert_close(sums[..., 10:51].double(), 1 + received[:, read], rtol=0, atol=1e-6)
    for untouched in (sums[..., :10], sums[..., 51:], sums[1], diagonals[..., :50], diagonals[..., 51:]):
        assert bool((untouched == 1).all())


# What they are not for.


def test_gradients_are_refused() -> None:
    some = case(5)
    graded = Case(**{**vars(some), "query": some.query.clone().requires_grad_()})
    assert not kernels.supports(graded.query, graded.key, graded.value)
    with pytest.raises(CaptureError, match="gradients"):
        attended(graded)
    with torch.no_grad():
        assert kernels.supports(graded.query, graded.key, graded.value)
        assert error(graded) < EXACT


def test_keys_without_rows_are_refused() -> None:
    some = case(5, 3)
    with pytest.raises(CaptureError, match="8 keys"):
        attended(Case(**{**vars(some), "first": 2}))


def test_what_is_supported() -> None:
    some = case(5)
    assert kernels.supports(some.query, some.key, some.value)
    assert not kernels.supports(some.query.double(), some.key.double(), some.value.double())
    assert not kernels.supports(some.query.half(), some.key, some.value)
    wide = torch.zeros(1, 1, 2, 257)
    assert not kernels.supports(wide.half(), wide.half(), wide.half())
    assert not kernels.supports(wide[..., :129], wide[..., :129], wide[..., :129])
    assert kernels.supports(wide[..., :256].half(), wide[..., :256].half(), wide[..., :256].half())
    assert not kernels.supports(some.query[:, :1], some.key.expand(-1, 2, -1, -1), some.value)
    assert not kernels.supports(some.query[:, :, :0], some.key, some.value)
