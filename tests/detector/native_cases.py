"""Attention for the tests of what is in C: shapes, inputs, and the whole map in float64."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lapwing_detector import native
from lapwing_detector.native import build
from lapwing_detector.scratch import Scratch

SAME = 2e-6
"""Of each number, or of itself where it is larger than 1: float32 sums of at most 330, each rounded at 6e-8."""

needs_library = pytest.mark.skipif(not native.available(), reason="attention in C is not built, or not for this CPU")
needs_compiler = pytest.mark.skipif(
    not (build.here() and any(map(shutil.which, ("cc", "gcc", "clang")))), reason="there is no C compiler"
)

NARROW = ("-DLANES=4", "-DROWS=5")

BUILDS = {"installed": None, "wide": ("-mavx2", "-mfma", "-Wno-psabi", "-DLANES=16", "-DROWS=12"), "narrow": NARROW}
"""The widths of other CPUs, in instructions that this one has."""


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 6
    shared: int = 3
    rows: int = 90
    first: int = 0
    width: int = 8
    value_width: int = 8
    kind: str = "plain"
    scaling: float = 0.3
    spread: float = 1.0
    """Of the numbers in query, key and value."""


SHAPES = {
    "plain": Case(),
    "one sequence": Case(batch=1, rows=330, width=64, value_width=64, scaling=0.125),
    "behind a cache": Case(first=211, rows=64),
    "one row more than a tile": Case(rows=129),
    "as many as a tile": Case(rows=128),
    "no head shares": Case(heads=3, rows=100),
    "all share one": Case(heads=71, shared=1, rows=40, first=3),
    "a group of five": Case(heads=5, shared=1, rows=77),
    "wide keys": Case(batch=1, heads=2, shared=1, rows=150, width=192, value_width=128, scaling=0.07),
    "odd widths": Case(width=7, value_width=21),
    "one number wide": Case(width=1, value_width=1),
    "window": Case(kind="window", rows=330),
    "padding on the left": Case(kind="left"),
    "padding on the right": Case(kind="right"),
    "rows that see nothing": Case(kind="blind"),
    "sharp": Case(rows=200, width=32, scaling=1.0, spread=3.0),
    "flat": Case(rows=330, scaling=1e-4),
}


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    starts: Tensor | None
    counted: Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype), self.starts, self.counted)


def made(of: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int, tokens: int, width: int) -> Tensor:  # laid out as projections give them
        return torch.randn(of.batch, tokens, heads, width, generator=generator).transpose(1, 2) * of.spread

    own = torch.arange(of.first, of.first + of.rows)
    starts, counted = None, None
    if of.kind == "window":
        starts = (own - 150).clamp(min=0)[None].int()  # one for all sequences
    elif of.kind == "left":
        padding = torch.tensor([0, 37])
        counted = own >= padding[:, None]
        starts = torch.where(counted, padding[:, None], 0).int()
    elif of.kind == "newest":  # one row of several sequences, the last of which is padding
        starts = torch.linspace(0, of.first, of.batch).int()[:, None]
        starts[-1], counted = of.first + 1, torch.tensor([[True]] * (of.batch - 1) + [[False]])
    elif of.kind == "right":
        counted = own < torch.tensor([[of.rows], [31]])
    elif of.kind == "blind":
        starts = torch.where(own % 5 == 2, own + 1, 0).int()[None]
    columns = of.first + of.rows
    return Inputs(
        random(of.heads, of.rows, of.width),
        random(of.shared, columns, of.width),
        random(of.shared, columns, of.value_width),
        starts,
        counted,
    )


def whole(of: Case, given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The same three from the whole map in float64."""
    group = of.heads // of.shared
    query, key, value = given.query.double(), given.key.double(), given.value.double()
    scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * of.scaling
    rows, columns = scores.shape[-2:]
    own, seen = torch.arange(of.first, columns)[:, None], torch.arange(columns)
    starts = torch.zeros(1, rows) if given.starts is None else given.starts
    visible = (seen <= own) & (seen >= starts[:, None, :, None])
    maps = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    counted = maps if given.counted is None else maps * given.counted[:, None, :, None]
    output = (maps @ value.repeat_interleave(group, 1)).transpose(1, 2)
    return output, maps.diagonal(offset=of.first, dim1=-2, dim2=-1), counted.sum(-2)


def attended(of: Case, given: Inputs, scratch: Scratch | None = None, **changes: object) -> tuple[Tensor, ...]:
    options: dict[str, object] = {
        "starts": given.starts,
        "first": of.first,
        "counted": given.counted,
        "scaling": of.scaling,
        **changes,
    }
    return native.attend(given.query, given.key, given.value, scratch=scratch or Scratch(), **options)  # type: ignore[arg-type]


def attended_row(
    of: Case, given: Inputs, scratch: Scratch | None = None, **changes: object
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attended`, of the newest row; it is added to what is there, and nothing else is touched."""
    tokens, columns = of.first + 4, of.first + 1  # as if the first three keys had fallen out of a window
    diagonal, received = torch.full((2, of.batch, of.heads, tokens + 9), 0.5)
    options: dict[str, object] = {
        "starts": given.starts,
        "counted": given.counted,
        "scaling": of.scaling,
        "heads": None,
        **changes,
    }
    output = native.attend_row(
        given.query,
        given.key,
        given.value,
        diagonal=diagonal,
        received=received,
        tokens=tokens,
        scratch=scratch or Scratch(),
        **options,  # type: ignore[arg-type]
    )
    before, row, beyond = received.split([tokens - columns, columns, 9], -1)
    earlier, newest, later = diagonal.split([tokens - 1, 1, 9], -1)
    assert all((part == 0.5).all() for part in (before, beyond, earlier, later))
    return output, newest, row - 0.5


def errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    pairs = zip(found, expected, strict=True)
    return [float(((one - other) / other.abs().clamp(min=1)).abs().max()) for one, other in pairs]


def wide_model() -> LlamaForCausalLM:
    """Its heads are as wide as the library takes them for one row."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()
