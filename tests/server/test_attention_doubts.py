"""What sums over rows must keep to: what some causal map could have given is taken, and nothing else."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from attention_fakes import (
    MAKE,
    READ,
    UNREAD,
    Maps,
    a_logarithmic_probe,
    a_summary,
    add,
    an_assembly,
    changed,
    coarse_rows,
    local_score,
    logit_of,
    more,
    outcome_of,
    put,
    refusal_of,
    some_maps,
    some_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from lapwing_server.attention_doubts import rows_doubts, summary_doubts
from lapwing_server.attention_slices import Rules, Sums
from lapwing_server.refusal import Refusal

TOKENS = 13
LAST = TOKENS - 1
EXAMPLES = 1000 if os.environ.get("LAPWING_SOAK") == "1" else 150
DTYPES = ["float32", "float16", "bfloat16"]


def sums_of(maps: Maps) -> Sums:
    """Of (heads, rows, columns), all rows."""
    return Sums(np.diagonal(maps, 0, 1, 2).astype(np.float32), maps.sum(axis=1, dtype=np.float64))


def broken_rule(sums: Sums, rules: Rules, first_token: int = 0) -> str:
    """The first one that is broken; empty when none is."""
    doubts = summary_doubts(sums, first_token, rules)
    return next((f"{doubt.field}: {doubt.message}" for doubt in doubts if doubt.broken.any()), "")


# The theorem.


def some_map_has(diagonal: Any, received: Any) -> bool:
    """Whether a causal map whose rows add up to 1 has these sums, (tokens,) each: by linear programming."""
    places = [(row, column) for row in range(len(diagonal)) for column in range(row)]
    rows = np.array([[row == own for row, _ in places] for own in range(len(diagonal))], float)
    columns = np.array([[column == own for _, column in places] for own in range(len(diagonal))], float)
    expected = np.concatenate([1 - diagonal, received - diagonal])
    return bool(linprog(np.zeros(len(places)), A_eq=np.vstack([rows, columns]), b_eq=expected, bounds=(0, 1)).success)


def test_sums_are_taken_exactly_when_some_causal_map_has_them() -> None:
    """On a grid of eighths, against which no tolerance weighs."""
    tokens, outcomes = 5, Counter[bool]()
    share = st.lists(st.integers(0, 8), min_size=tokens, max_size=tokens)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(st.lists(share, min_size=tokens, max_size=tokens), share, share, st.booleans())
    def check(bounds: list[list[int]], own: list[int], moved: list[int], honest: bool) -> None:
        maps = np.zeros((1, tokens, tokens))
        for row in range(tokens):
            cuts = [0, *sorted(bounds[row][:row]), 8]
            maps[0, row, : row + 1] = np.diff(cuts) / 8
        sums = sums_of(maps)
        if not honest:  # the sum over all tokens stays
            source, target = own[0] % tokens, own[1] % tokens
            sums.received[0, source] -= moved[0] / 8
            sums.received[0, target] += moved[0] / 8
        possible = some_map_has(sums.diagonal[0].astype(float), sums.received[0])
        assert (broken_rule(sums, Rules(False, "float32")) == "") == possible
        assert possible or not honest
        outcomes[possible] += 1

    check()
    assert min(outcomes[True], outcomes[False]) > EXAMPLES // 20, "control: both happen"


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_that_rounding_moved_are_taken(dtype: str) -> None:
    """By as much as the type of the model allows for in every weight, and of any block of rows."""
    coarseness, generator = {"float32": 2**-13, "float16": 2**-11, "bfloat16": 2**-9}[dtype], np.random.default_rng(0)
    for tokens, sinks in itertools.product((1, 2, 60), (False, True)):
        maps = some_maps(tokens, sinks=0.4 * sinks)[0].astype(np.float64)
        maps *= 1 + coarseness * generator.uniform(-1, 1, maps.shape)
        for first in {0, tokens // 2, tokens - 1}:
            block = maps[:, first:]
            sums = Sums(np.diagonal(block, first, 1, 2).astype(np.float32), block.sum(axis=1))
            assert broken_rule(sums, Rules(sinks, dtype), first) == ""


# The last token.


@pytest.mark.parametrize("blocks", [(0, TOKENS), (0, 1, 6, TOKENS)])
@pytest.mark.parametrize("by", [-1.5, -0.5, 0.5, 1.5])
def test_the_last_token_of_a_block_receives_its_own_attention(blocks: tuple[int, ...], by: float) -> None:
    """What it should not have, or lacks, went to another token, so that the sum over all of them stays."""
    one = Rules(False, "float32").tolerance(TOKENS)
    maps, assembly = some_maps(TOKENS), an_assembly()
    maps[:, :, LAST] = 0.1 / LAST
    maps[:, :, LAST, LAST] = 0.9

    def move(array: Any) -> None:
        array[READ][LAST] += by * one
        array[READ][0] -= by * one

    *before, last = [a_summary(maps, *pair) for pair in itertools.pairwise(blocks)]
    for part in before:
        add(assembly, part)
    refusal = outcome_of(lambda: add(assembly, changed(last, "received", move)))
    assert (refusal is not None) == (abs(by) > 1), "within the tolerance it is taken"
    if refusal is not None:
        assert (refusal.field, refusal.reason) == ("summary.received", "NOT_ATTENTION")


@pytest.mark.parametrize("dtype", DTYPES)
def test_how_near_it_must_be_depends_on_how_the_model_computes(dtype: str) -> None:
    one = Rules(False, dtype).tolerance(TOKENS)
    for by, taken in ((0.9, True), (1.1, False)):
        maps = some_maps(TOKENS)[0].astype(np.float64)
        maps[:, LAST, 0] += maps[:, LAST, LAST] - 0.25
        maps[:, LAST, LAST] = 0.25
        sums = sums_of(maps)
        sums.received[:, LAST] += by * one
        sums.received[:, 0] -= by * one
        assert ("the last row alone" in broken_rule(sums, Rules(False, dtype))) != taken


@pytest.mark.parametrize("of_rows", [False, True])
def test_a_small_weight_is_the_same_wherever_it_is_sent(of_rows: bool) -> None:
    """A probe that takes logarithms sees the difference of 1e-9 and 2e-9, which is far below every tolerance."""
    maps, probe = some_maps(TOKENS), a_logarithmic_probe()
    maps[:, :, LAST, 0] += maps[:, :, LAST, LAST] - 1e-9
    maps[:, :, LAST, LAST] = 1e-9
    for value in (0.0, 2e-9):
        part = some_rows(maps) if of_rows else a_summary(maps)
        if of_rows:
            part.diagonal.CopyFrom(a_summary(maps).diagonal)
        wrong = changed(part, "diagonal", put(*READ, LAST, value=value))
        field = "rows.diagonal" if of_rows else "summary.received"
        assert refusal_of(lambda w=wrong: add(an_assembly(probe=probe), w)) == (field, "NOT_ATTENTION")
    assembly = an_assembly(probe=probe)
    add(assembly, changed(a_summary(maps), "diagonal", put(*READ, LAST, value=1.001e-9)))
    assert logit_of(assembly, probe) == pytest.approx(local_score(maps, probe), abs=1e-3), "control"


def test_what_float16_loses_may_be_lost_beside_the_diagonal() -> None:
    maps = some_maps(TOKENS)
    maps[:, :, 5, 4] += maps[:, :, 5, 5] - 1e-9
    maps[:, :, 5, 5] = 1e-9
    part = coarse_rows(maps)
    add(an_assembly(), part)
    assert refusal_of(lambda: add(an_assembly(), changed(part, "diagonal", put(*READ, 5, value=1e-3))))[1]


# Zeros.


def to_the_first_token(tokens: int = TOKENS) -> Maps:
    """Every row gives all it has to token 0, as heads at rest nearly do."""
    maps = np.zeros((2, 3, tokens, tokens), np.float32)
    maps[..., 0] = 1.0
    return maps


@pytest.mark.parametrize("part", ["summary", "rows"])
def test_control_single_weights_may_be_zero(part: str) -> None:
    """Small ones are lost where they are computed; then every diagonal but the first is 0."""
    maps, assembly = to_the_first_token(), an_assembly()
    add(assembly, MAKE[part](maps))
    assert logit_of(assembly) == pytest.approx(local_score(maps), abs=1e-5)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("maps", [some_maps(TOKENS), to_the_first_token()], ids=["some", "to the first"])
def test_a_diagonal_of_zeros_is_refused(sinks: bool, maps: Maps) -> None:
    """The first token has nothing but itself, so that not even a model with sinks has a 0 there."""
    scale = 0.6 if sinks else 1.0
    wrong = changed(a_summary(scale * maps), "diagonal", put(*READ, value=0.0))
    refusal = outcome_of(lambda: add(an_assembly(attention_sinks=sinks), wrong))
    assert refusal is not None
    assert (refusal.field, refusal.reason) == ("summary.diagonal", "NOT_ATTENTION")
    assert "head 1 of layer 2" in refusal.message
    add(an_assembly(attention_sinks=sinks), changed(a_summary(scale * maps), "diagonal", put(*UNREAD, value=0.0)))
    coarse = changed(coarse_rows(scale * maps), "diagonal", put(*READ, value=0.0))
    assert refusal_of(lambda: add(an_assembly(attention_sinks=sinks), coarse)) == ("rows.diagonal", "NOT_ATTENTION")


def test_sums_of_nothing_are_refused_also_with_sinks() -> None:
    maps, assembly = some_maps(TOKENS, sinks=0.4), an_assembly(attention_sinks=True)
    add(assembly, a_summary(maps, 0, 6))
    nothing = changed(a_summary(maps, 6), "diagonal", put(*READ, value=0.0))
    nothing = changed(nothing, "received", put(*READ, value=0.0))
    assert refusal_of(lambda: add(assembly, nothing)) == ("summary.received", "NOT_ATTENTION")


# Missing rows.


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("sent", [np.float32, np.float16])
@pytest.mark.parametrize("model", [*DTYPES, "of no name"])
def test_a_row_of_zeros_is_missing_whatever_the_types_are(model: str, sent: Any, sinks: bool) -> None:
    rules, maps = Rules(sinks, model), some_maps(TOKENS, sinks=0.4 * sinks)[0].astype(sent)
    assert not any(doubt.broken.any() for doubt in rows_doubts(maps, None, 0, rules)), "control"
    for row in (0, 5, LAST):
        gap = maps.copy()
        gap[1, row] = 0.0
        [broken] = [doubt for doubt in rows_doubts(gap, None, 0, rules) if doubt.broken.any()]
        assert (broken.field, np.argwhere(broken.broken).tolist()) == ("rows.weights", [[1, row]])


@pytest.mark.parametrize(("model", "most"), [("float32", 2500), ("float16", 950), ("bfloat16", 250)])
def test_a_row_that_is_missing_in_sums_shows_in_as_many_rows_as_is_said(model: str, most: int) -> None:
    """And not in some more, which `Rules.tolerance` says, too; nor ever with attention sinks."""
    for tokens, shows in ((most, True), (most + 50, False)):
        rows = 1 / np.arange(1.0, tokens + 1)  # uniform attention
        received = rows[::-1].cumsum()[::-1]
        received[:100] -= rows[99]  # row 99
        short = Sums(rows[None].astype(np.float32), received[None])
        assert ("does not add up" in broken_rule(short, Rules(False, model))) == shows
    scaled = Sums(0.6 * short.diagonal, 0.6 * short.received)
    assert broken_rule(scaled, Rules(True, model)) == ""


def test_rows_in_bfloat16_are_refused_by_name() -> None:
    """Two bytes each, as those of float16 are: only what the tensor says of itself tells them apart."""
    part = some_rows(some_maps(TOKENS).astype(np.float16))
    part.weights.dtype = "DATA_TYPE_BFLOAT16"
    with pytest.raises(Refusal, match="is bfloat16; give float32 or float16") as caught:
        add(an_assembly(), part)
    assert (caught.value.field, caught.value.reason) == ("rows.weights.dtype", "INVALID_INPUT")
    part.weights.dtype = 77  # type: ignore[assignment]
    with pytest.raises(Refusal, match="is number 77; give float32 or float16"):
        add(an_assembly(), part)


def test_bytes_of_bfloat16_that_call_themselves_float16_are_no_attention() -> None:
    """1.0 of bfloat16 is 1.875 of float16."""
    bits = (some_maps(TOKENS).view(np.uint32) >> 16).astype(np.uint16)
    assert refusal_of(lambda: add(an_assembly(), some_rows(bits.view(np.float16)))) == ("rows.weights", "NOT_ATTENTION")


# What no rule can tell, so that nobody relies on it.


def backwards(maps: Maps) -> Maps:
    """Heads in each other's place."""
    return maps[:, ::-1]


def other_rows(maps: Maps) -> Maps:
    """Two rows that change what they give to the tokens that both see."""
    maps = maps.copy()
    both = maps[:, :, [5, 9], :5]
    shares = both.sum(-1, keepdims=True)
    maps[:, :, [5, 9], :5] = both[:, :, ::-1] / shares[:, :, ::-1] * shares
    return maps


@pytest.mark.parametrize("change", [backwards, other_rows, lambda maps: some_maps(TOKENS, seed=1)])
def test_another_map_of_a_causal_model_is_taken_as_it_is(change: Callable[[Maps], Maps]) -> None:
    maps = change(some_maps(TOKENS))
    assembly = an_assembly()
    add(assembly, a_summary(maps))
    assert logit_of(assembly) == pytest.approx(local_score(maps), abs=1e-5)
    assert math.isfinite(local_score(maps))


def test_control_what_a_token_receives_too_much_is_told_apart_from_what_rows_can_give() -> None:
    """Each token could receive so much alone, but not these together."""
    maps = some_maps(TOKENS)
    wrong = changed(a_summary(maps), "received", more(*READ, 10, by=0.9))
    wrong = changed(wrong, "received", more(*READ, 11, by=0.9))
    wrong = changed(wrong, "received", more(*READ, 0, by=-1.8))
    with pytest.raises(Refusal, match="more than the rows that see them have to give"):
        add(an_assembly(), wrong)
