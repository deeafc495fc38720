"""The comparisons with the whole map notice when one mechanism is left out of what the kernels are told or do."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from lapwing_detector.kernels import attending, columns
from tests.detector.kernel_cases import DEVICE, EXACT, Case, attended, case, error, expected, small_tiles

__all__ = ["small_tiles"]

SEEN = 0.01
"""Far above any tolerance."""


@pytest.mark.parametrize("rows", [(20, 0), (1, 20)])
@pytest.mark.parametrize(
    ("name", "mechanism"),
    [
        ("starts", {"window": 9}),
        ("starts", {"left": (0, 7)}),
        ("softcap", {"softcap": 1.5}),
        ("sinks", {"sinks": True}),
        ("counted", {"right": (1, 0)}),
    ],
)
def test_control_mechanism_left_out(rows: tuple[int, int], name: str, mechanism: dict[str, object]) -> None:
    whole = case(*rows, **mechanism)
    assert error(whole) < EXACT
    assert error(whole.without(name), against=whole) > SEEN


@pytest.mark.parametrize("rows", [(20, 0), (1, 20)])
def test_control_window_one_too_wide(rows: tuple[int, int]) -> None:
    assert error(case(*rows, window=10), against=case(*rows, window=9)) > SEEN


@pytest.mark.parametrize("rows", [(20, 0), (1, 20)])
def test_control_scale(rows: tuple[int, int]) -> None:
    whole = case(*rows)
    assert error(Case(**{**vars(whole), "scaling": whole.scaling / 2}), against=whole) > SEEN


@pytest.mark.parametrize("rows", [(20, 0), (1, 20)])
def test_control_order_of_key_value_heads(rows: tuple[int, int]) -> None:
    whole = case(*rows, heads=4, shared=2)
    turned = Case(**{**vars(whole), "key": whole.key.flip(1), "value": whole.value.flip(1)})
    assert error(turned, against=whole) > SEEN


def test_control_order_of_the_heads_that_are_read() -> None:
    for rows in ((20, 0), (1, 20)):
        whole = case(*rows, heads=4, shared=2)
        turned = attended(whole, torch.tensor([0, 3], dtype=torch.int32, device=DEVICE))[2]
        assert (turned - expected(whole)[2][:, [3, 0]]).abs().max() > SEEN


# Kernels whose own lines are changed: (function, line, what it becomes, case).

CHANGES = {
    "causal, sums": ("sum_columns", "own[None, :] <= (first + at)[:, None]", "own[None, :] >= 0", {}),
    "causal, forward": ("forward", "(columns[None, :] <= own[:, None]) & ", "", {}),
    "window, sums": ("sum_columns", "sees &= own[None, :] >= ", "sees &= own[None, :] * 0 <= ", {"window": 9}),
    "window, forward": ("forward", "(columns[None, :] >= start[:, None]) & ", "", {"window": 9}),
    "window, pieces": ("attend_in_pieces", "(at >= start) & ", "", {"rows": 1, "first": 30, "window": 9}),
    "window, row": ("add_row", "(at >= start) & ", "", {"rows": 1, "first": 30, "window": 9}),
    "full blocks behind a window": (
        "sum_columns",
        "(at >= below) & (at < rows) & (every == 0)",
        "at < 0",
        {"window": 9},
    ),
    "blocks that no row counts in": (
        "sum_columns",
        "end = tl.maximum(end, tl.max",
        "end = tl.minimum(end, tl.max",
        {"window": 9},
    ),
    "counted": ("sum_columns", "tl.load(counted + at, mask=at < rows, other=0) != 0)", "at >= 0)", {"right": (0, 20)}),
    "counted, row": (
        "add_row",
        "counts = tl.load(counted + batch) != 0",
        "counts = True",
        {"rows": 1, "first": 9, "right": (0, 1)},
    ),
    "group, sums": (
        "sum_columns",
        "head // GROUP * key_head",
        "head % GROUP * key_head",
        {"rows": 17, "heads": 4, "shared": 2},
    ),
    "group, forward": (
        "forward",
        "head // GROUP * key_head",
        "head % GROUP * key_head",
        {"rows": 17, "heads": 4, "shared": 2},
    ),
    "sink": ("forward", "total += 1.0", "total += 0.0", {"sinks": True}),
    "sink, row": (
        "attend_in_pieces",
        "total += tl.exp2(sink - largest)",
        "total += 0.0",
        {"rows": 1, "first": 9, "sinks": True},
    ),
    "running softmax": ("forward", "total * shrink + tl.sum", "total + tl.sum", {}),
    "last row of a block": (
        "sum_columns",
        "tl.minimum(left + COLUMNS - first, rows)",
        "tl.minimum(left + COLUMNS - 17 - first, rows)",
        {},
    ),
}


@cache
def unchanged_error(of: tuple[tuple[str, object], ...]) -> float:
    return error(case(**{"rows": 37, **dict(of)}))


@pytest.mark.parametrize("change", CHANGES)
def test_control_changed_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str) -> None:
    name, line, becomes, of = CHANGES[change]
    source = Path(sys.modules[getattr(attending, name).__module__].__file__ or "").read_text()
    assert line in source
    (tmp_path / "changed.py").write_text(source.replace(line, becomes))
    spec = importlib.util.spec_from_file_location("changed", tmp_path / "changed.py")
    assert spec is not None
    assert spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    whole = case(**{"rows": 37, **of})
    assert unchanged_error(tuple(of.items())) < EXACT
    monkeypatch.setattr(attending, name, getattr(changed, name))
    assert error(whole, against=whole) > SEEN


def test_control_without_the_sink_in_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attending.forward

    def without(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = real(*arguments)
        return output, lse - 0.1

    whole = case(20, sinks=True)
    monkeypatch.setattr(attending, "forward", without)
    assert error(whole, against=whole) > SEEN


def test_control_memory_that_is_not_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = columns.sum_columns

    def unwritten(query: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        diagonal, received = real(query, *rest)
        return diagonal.new_empty(diagonal.shape), received

    monkeypatch.setattr(attending, "sum_columns", unwritten)
    whole = case(20)
    assert error(whole, against=whole) == float("inf")


def test_control_keys_behind_the_text_are_seen() -> None:
    whole = case(20)
    assert bool(whole.key.isfinite().all())
    beyond = torch.as_strided(whole.key, (2, 1, 21, 12), whole.key.stride(), whole.key.storage_offset())
    assert bool(beyond[:, :, 20:].isnan().all())  # what a kernel would read that read on
