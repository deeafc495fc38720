"""Slices of attention put together: the same sums whatever the cut, in order, whole, and within bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attention_fakes import (
    FLOAT16,
    MAKE,
    READ_HEADS,
    UNREAD,
    Maps,
    a_logarithmic_probe,
    a_shadow,
    a_summary,
    add,
    an_assembly,
    changed,
    coarse_rows,
    local_score,
    logit_of,
    places,
    put,
    refusal_of,
    some_maps,
    some_rows,
    summary_of,
)
from engine_fakes import CONTEXT, a_probe
from hypothesis import given, settings
from hypothesis import strategies as st

from lapwing_server.attention_sums import TOKEN_BYTES
from lapwing_server.refusal import Refusal

TOKENS = 13


# The same sums, whatever the cut.


def whole_summary(maps: Maps) -> list[Any]:
    return [a_summary(maps)]


def summaries_of_blocks(maps: Maps) -> list[Any]:
    bounds = [0, 1, 2, 7, 8, maps.shape[2]]
    return [a_summary(maps, *pair) for pair in itertools.pairwise(bounds)]


def summaries_head_by_head(maps: Maps) -> list[Any]:
    return [a_summary(maps, *rows, *place) for place in places() for rows in ((0, 5), (5, maps.shape[2]))]


def whole_rows(maps: Maps) -> list[Any]:
    return [some_rows(maps)]


def row_by_row(maps: Maps) -> list[Any]:
    return [some_rows(maps, row, row + 1, *place) for row in range(maps.shape[2]) for place in places()]


CUTS = [whole_summary, summaries_of_blocks, summaries_head_by_head, whole_rows, row_by_row]


@pytest.mark.parametrize("cut", CUTS)
def test_the_same_score_as_the_library_however_the_attention_is_cut(cut: Callable[[Maps], list[Any]]) -> None:
    maps, assembly = some_maps(TOKENS), an_assembly()
    for part in cut(maps):
        add(assembly, part)
    assert logit_of(assembly) == pytest.approx(local_score(maps), abs=1e-5)  # float32
    assert local_score(some_maps(TOKENS, seed=1)) != pytest.approx(local_score(maps), abs=1e-2), "control"


def test_many_increments_stay_as_exact_as_one_sum() -> None:
    maps, assembly = some_maps(CONTEXT), an_assembly()
    for row in range(CONTEXT):
        add(assembly, a_summary(maps, row, row + 1))
    found, expected = assembly.summary(a_probe(), CONTEXT), summary_of(maps)
    assert found is not None
    read = a_probe().selected
    np.testing.assert_allclose(found.received[read], expected.received[read], rtol=2**-22)
    one_by_one = np.zeros(maps.shape[:3], np.float32)
    for row in range(CONTEXT):
        one_by_one += maps[:, :, row]
    assert np.abs(one_by_one / expected.received - 1).max() > 2**-22, "control: float32 would not have been enough"
    assert np.isnan(found.received[~read]).all(), "what nobody reads is not held"


def test_rows_in_float16_are_near() -> None:
    maps, assembly = some_maps(TOKENS), an_assembly()
    add(assembly, some_rows(maps.astype(np.float16)))
    assert 1e-6 < abs(logit_of(assembly) - local_score(maps)) < FLOAT16


def test_rows_in_float16_need_the_diagonal_for_a_probe_that_takes_logarithms() -> None:
    maps, probe = some_maps(TOKENS), a_logarithmic_probe()
    maps[:, :, 5, 4] += maps[:, :, 5, 5] - 1e-9
    maps[:, :, 5, 5] = 1e-9  # whose logarithm is -21; that of float16's 0 counts as -28
    expected = local_score(maps, probe)
    assembly = an_assembly(probe=probe)
    assert refusal_of(lambda: add(assembly, some_rows(maps.astype(np.float16)))) == ("rows.diagonal", "INVALID_INPUT")
    add(assembly, coarse_rows(maps))
    assert logit_of(assembly, probe) == pytest.approx(expected, abs=1e-5), "of the diagonal nothing is lost"
    lost = maps.astype(np.float16).astype(np.float32)
    assert abs(local_score(lost, probe) - expected) > 0.1, "control: without it much would be"
    assembly = an_assembly(probe=probe)
    add(assembly, some_rows(maps))
    assert logit_of(assembly, probe) == pytest.approx(expected, abs=1e-5)


def test_a_shadow_that_takes_logarithms_has_no_score_of_rows_in_float16_alone() -> None:
    maps, shadow = some_maps(TOKENS), a_logarithmic_probe()
    for part, scored in ((some_rows(maps.astype(np.float16)), False), (coarse_rows(maps), True)):
        assembly = an_assembly(shadows=(shadow,))
        add(assembly, part)
        assert (assembly.summary(shadow, assembly.require_whole()) is not None) is scored
        assert logit_of(assembly) == pytest.approx(local_score(maps), abs=FLOAT16)


def test_any_cut_into_blocks_gives_the_same_sums() -> None:
    maps = some_maps(TOKENS)
    expected = local_score(maps)

    @settings(max_examples=60, deadline=None)
    @given(st.sets(st.integers(1, TOKENS - 1)), st.booleans(), st.randoms(use_true_random=False))
    def check(inner: set[int], as_rows: bool, random: Any) -> None:
        bounds, assembly = [0, *sorted(inner), TOKENS], an_assembly()
        cut = some_rows if as_rows else a_summary
        queues = [[cut(maps, *pair, *place) for pair in itertools.pairwise(bounds)] for place in places()]
        while any(queues):
            add(assembly, random.choice([queue for queue in queues if queue]).pop(0))
        assert logit_of(assembly) == pytest.approx(expected, abs=1e-5)

    check()


# Order, and being whole.


def test_rows_of_a_head_come_in_order_without_gap_and_once() -> None:
    maps = some_maps(TOKENS)
    for first, last in ((1, 3), (5, TOKENS), (0, 4), (3, 5)):
        assembly = an_assembly()
        add(assembly, a_summary(maps, 0, 4))
        wrong = a_summary(maps, first, last)
        assert refusal_of(lambda a=assembly, w=wrong: add(a, w)) == ("summary.first_token", "OUT_OF_ORDER")
        add(assembly, a_summary(maps, 4, TOKENS))
        assert logit_of(assembly) == pytest.approx(local_score(maps), abs=1e-5)
    assert refusal_of(lambda: add(an_assembly(), some_rows(maps, 1, 2))) == ("rows.first_token", "OUT_OF_ORDER")


def test_a_slice_over_heads_that_have_come_unequally_far_is_refused() -> None:
    maps, assembly = some_maps(TOKENS), an_assembly()
    add(assembly, a_summary(maps, 0, 4, slice(0, 1)))
    assert refusal_of(lambda: add(assembly, a_summary(maps, 4, 6))) == ("summary.first_token", "OUT_OF_ORDER")


def test_a_negative_token_is_refused() -> None:
    part = a_summary(some_maps(TOKENS))
    part.first_token = -1
    assert refusal_of(lambda: add(an_assembly(), part)) == ("summary.first_token", "OUT_OF_ORDER")


@pytest.mark.parametrize(("first", "second"), [("summary", "rows"), ("rows", "summary")])
def test_summaries_and_rows_are_not_mixed(first: str, second: str) -> None:
    maps, assembly = some_maps(TOKENS), an_assembly()
    add(assembly, MAKE[first](maps, 0, 4))
    assert refusal_of(lambda: add(assembly, MAKE[second](maps, 4, TOKENS))) == (second, "OUT_OF_ORDER")


def test_a_stream_without_attention_has_no_score() -> None:
    assert refusal_of(an_assembly().require_whole) == ("part", "EMPTY_STREAM")


def test_a_head_of_the_probe_that_lags_behind_is_named() -> None:
    maps, assembly = some_maps(TOKENS), an_assembly()
    add(assembly, a_summary(maps, 0, 8))
    for place in places():
        if place != (slice(1, 2), slice(2, 3)):
            add(assembly, a_summary(maps, 8, TOKENS, *place))
    with pytest.raises(Refusal, match="head 2 of layer 2 has come up to token 8") as caught:
        assembly.require_whole()
    assert (caught.value.field, caught.value.reason) == ("summary", "INCOMPLETE")
    assert refusal_of(lambda: assembly.tokens("score_now")) == ("score_now", "INCOMPLETE")
    add(assembly, a_summary(maps, 8, TOKENS, slice(1, 2), slice(2, 3)))
    assert assembly.require_whole() == TOKENS


def test_control_a_head_that_nobody_reads_may_lag_behind() -> None:
    maps, assembly = some_maps(TOKENS), an_assembly()
    for place in places():
        if place != (slice(0, 1), slice(0, 1)):
            add(assembly, a_summary(maps, 0, TOKENS, *place))
    assert logit_of(assembly) == pytest.approx(local_score(maps), abs=1e-5)


def test_a_declared_response_must_come_whole_and_no_more() -> None:
    maps = some_maps(TOKENS)
    assembly = an_assembly(response_tokens=TOKENS - 2)
    add(assembly, a_summary(maps, 0, TOKENS - 1))
    assert refusal_of(assembly.require_whole) == ("header.response_tokens", "INCOMPLETE")
    add(assembly, a_summary(maps, TOKENS - 1, TOKENS))
    assert assembly.require_whole() == TOKENS
    assembly = an_assembly(response_tokens=TOKENS - 3)
    assert refusal_of(lambda: add(assembly, a_summary(maps))) == ("summary.received", "TOO_LONG")
    assert refusal_of(lambda: add(an_assembly(response_tokens=3), some_rows(maps))) == ("rows.weights", "TOO_LONG")


def test_a_part_of_the_prompt_is_not_the_whole() -> None:
    assembly = an_assembly(prompt_tokens=TOKENS + 1)
    add(assembly, a_summary(some_maps(TOKENS)))
    assert refusal_of(assembly.require_whole) == ("header.prompt_tokens", "INCOMPLETE")


def test_more_tokens_than_the_model_takes_are_refused() -> None:
    assembly = an_assembly()
    assert refusal_of(lambda: add(assembly, a_summary(some_maps(CONTEXT + 1)))) == ("summary.received", "TOO_LONG")
    add(assembly, a_summary(some_maps(CONTEXT)))


# Memory.


def test_what_would_take_too_much_is_refused_before_it_is_taken() -> None:
    one = READ_HEADS * TOKEN_BYTES
    assert refusal_of(lambda: an_assembly(100 * one - 1, prompt_tokens=100)) == ("header.prompt_tokens", "TOO_LARGE")
    declared = {"prompt_tokens": 60, "response_tokens": 40}
    assert refusal_of(lambda: an_assembly(100 * one - 1, **declared)) == ("header.response_tokens", "TOO_LARGE")
    assembly = an_assembly(100 * one, **declared)
    assert assembly.nbytes == 0, "nothing is taken for what was only announced"
    assembly = an_assembly(TOKENS * one - 1)
    maps = some_maps(TOKENS)
    assert refusal_of(lambda: add(assembly, a_summary(maps))) == ("summary.received", "TOO_LARGE")
    assert refusal_of(lambda: add(assembly, some_rows(maps))) == ("rows.weights", "TOO_LARGE")
    assert assembly.nbytes == 0


def test_however_rows_come_no_more_is_held_than_allowed() -> None:
    most = 20 * READ_HEADS * TOKEN_BYTES
    maps, assembly = some_maps(20), an_assembly(most)
    for row in range(20):
        add(assembly, some_rows(maps, row, row + 1))
        assert (row + 1) * READ_HEADS * TOKEN_BYTES <= assembly.nbytes <= most
    assert refusal_of(lambda: add(assembly, some_rows(some_maps(21), 20, 21))) == ("rows.weights", "TOO_LARGE")
    exact = an_assembly(most, response_tokens=18)
    add(exact, some_rows(maps, 0, 1))
    assert exact.nbytes == most, "of what was declared room is made once"


# Shadows.


def test_a_shadow_scores_the_same_attention() -> None:
    maps, shadow = some_maps(TOKENS), a_shadow()
    assembly = an_assembly(shadows=(shadow,))
    add(assembly, a_summary(maps))
    summary = assembly.summary(shadow, assembly.require_whole())
    assert summary is not None
    assert shadow.score(summary)[0] == pytest.approx(local_score(maps, shadow), abs=1e-5)
    assert logit_of(assembly) == pytest.approx(local_score(maps), abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, 2.0])
def test_a_shadow_whose_heads_are_not_sound_has_no_score_and_nobody_else_suffers(value: float) -> None:
    maps, shadow = some_maps(TOKENS), a_shadow()
    assembly = an_assembly(shadows=(shadow,))
    add(assembly, changed(a_summary(maps), "diagonal", put(*UNREAD, 3, value=value)))
    assert assembly.summary(shadow, assembly.require_whole()) is None
    assert logit_of(assembly) == pytest.approx(local_score(maps), abs=1e-5)


def test_a_shadow_whose_heads_do_not_come_has_no_score() -> None:
    maps, shadow = some_maps(TOKENS), a_shadow()
    assembly = an_assembly(shadows=(shadow,))
    for place in places():
        if place != (slice(0, 1), slice(0, 1)):
            add(assembly, a_summary(maps, 0, TOKENS, *place))
    assert assembly.summary(shadow, assembly.require_whole()) is None
    deeper = replace(shadow, layers=(0, 1))
    assembly = an_assembly(shadows=(deeper,))
    add(assembly, a_summary(maps))
    assert assembly.summary(deeper, assembly.require_whole()) is None
