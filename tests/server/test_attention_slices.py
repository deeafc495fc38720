"""The numbers of a slice: what can't be of an attention map is refused by name, each rule with a control."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attention_fakes import (
    FLOAT16,
    MAKE,
    MOST_BYTES,
    READ,
    SAMPLE,
    UNREAD,
    Maps,
    a_bfloat16_header,
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
from engine_fakes import CONTEXT, a_probe, an_identity
from hypothesis import given, settings
from hypothesis import strategies as st

from lapwing.v1 import detector_pb2, tensor_pb2
from lapwing_server.attention_assembly import Assembly
from lapwing_server.attention_header import read_header
from lapwing_server.attention_slices import Rules
from lapwing_server.refusal import Refusal

TOKENS = 13


def below_zero(array: Any) -> None:
    """A weight, what it loses going to another one of its row."""
    lost = array[READ][5, 3] + 1e-3
    array[READ][5, 3] -= lost
    array[READ][5, 4] += lost


WRONG_NUMBERS: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("summary", "diagonal", put(*READ, 3, value=math.nan), "NON_FINITE"),
    ("summary", "diagonal", put(*READ, 3, value=math.inf), "NON_FINITE"),
    ("summary", "received", put(*READ, 3, value=math.nan), "NON_FINITE"),
    ("summary", "received", put(*READ, 3, value=-math.inf), "NON_FINITE"),
    ("summary", "diagonal", put(*READ, 3, value=-1e-6), "NOT_ATTENTION"),
    ("summary", "diagonal", put(*READ, 3, value=1.01), "NOT_ATTENTION"),
    ("summary", "diagonal", put(*READ, 0, value=0.9), "NOT_ATTENTION"),
    ("summary", "received", more(*READ, 3, by=0.1), "NOT_ATTENTION"),
    ("summary", "received", more(*READ, 3, by=-0.1), "NOT_ATTENTION"),
    ("rows", "weights", put(*READ, 5, 3, value=math.nan), "NON_FINITE"),
    ("rows", "weights", put(*READ, 5, 3, value=math.inf), "NON_FINITE"),
    ("rows", "weights", below_zero, "NOT_ATTENTION"),
    ("rows", "weights", put(*READ, 5, 3, value=1.01), "NOT_ATTENTION"),
    ("rows", "weights", put(*READ, 5, 6, value=1e-8), "NOT_ATTENTION"),
    ("rows", "weights", more(*READ, 5, 3, by=1e-3), "NOT_ATTENTION"),
    ("rows", "weights", more(*READ, 5, 5, by=-1e-3), "NOT_ATTENTION"),
    ("coarse", "diagonal", put(*READ, 3, value=math.nan), "NON_FINITE"),
    ("coarse", "diagonal", put(*READ, 3, value=math.inf), "NON_FINITE"),
    ("coarse", "diagonal", put(*READ, 3, value=-1e-6), "NOT_ATTENTION"),
    ("coarse", "diagonal", put(*READ, 0, value=1.01), "NOT_ATTENTION"),
    ("coarse", "diagonal", more(*READ, 3, by=1e-2), "NOT_ATTENTION"),
]

SCORES_OF = {"summary": 1e-5, "rows": 1e-5, "coarse": FLOAT16}
"""How near to the library's score."""


@pytest.mark.parametrize(("part", "name", "change", "reason"), WRONG_NUMBERS)
def test_numbers_that_are_of_no_attention_map_are_refused(
    part: str, name: str, change: Callable[[Any], Any], reason: str
) -> None:
    maps, assembly = some_maps(TOKENS), an_assembly()
    wrong = changed(MAKE[part](maps), name, change)
    with pytest.raises(Refusal, match="head 1 of layer 2") as caught:
        add(assembly, wrong)
    assert (caught.value.field, caught.value.reason) == (f"{part}.{name}".replace("coarse", "rows"), reason)
    add(assembly, MAKE[part](maps))  # nothing of the refused one was added
    assert logit_of(assembly) == pytest.approx(local_score(maps), abs=SCORES_OF[part])


@pytest.mark.parametrize(("part", "name", "change", "reason"), WRONG_NUMBERS)
def test_control_the_same_in_a_head_that_nobody_reads_is_taken(
    part: str, name: str, change: Callable[[Any], Any], reason: str
) -> None:
    maps, assembly = some_maps(TOKENS), an_assembly()

    def elsewhere(array: Any) -> None:
        heads = array[::-1, ::-1].copy()  # READ and its mirror image, which is not read either way round
        change(heads)
        array[UNREAD] = heads[READ]

    add(assembly, changed(MAKE[part](maps), name, elsewhere))
    assert logit_of(assembly) == pytest.approx(local_score(maps), abs=SCORES_OF[part])


def test_a_diagonal_below_zero_is_refused_however_near_it_is_to_the_weights() -> None:
    maps = some_maps(TOKENS)
    maps[:, :, 5, 4] += maps[:, :, 5, 5]
    maps[:, :, 5, 5] = 0.0
    wrong = changed(coarse_rows(maps), "diagonal", put(*READ, 5, value=-1e-6))
    assert refusal_of(lambda: add(an_assembly(), wrong)) == ("rows.diagonal", "NOT_ATTENTION")
    add(an_assembly(), coarse_rows(maps))


def move_below_the_diagonal(array: Any) -> None:
    """What tokens 2 and 3 receive changes places with less than their self-attention; the sum stays."""
    array[READ][2] += array[READ][12]
    array[READ][12] = 0.0


def test_a_token_receives_at_least_its_own_attention() -> None:
    maps, assembly = some_maps(TOKENS), an_assembly()
    wrong = changed(a_summary(maps), "received", move_below_the_diagonal)
    assert refusal_of(lambda: add(assembly, wrong)) == ("summary.received", "NOT_ATTENTION")


def test_a_token_receives_at_most_one_from_each_row_that_sees_it() -> None:
    maps, assembly = some_maps(TOKENS), an_assembly()

    def move(array: Any) -> None:
        array[READ][12] += 1.0
        array[READ][0] -= 1.0

    wrong = changed(a_summary(maps), "received", move)
    assert refusal_of(lambda: add(assembly, wrong)) == ("summary.received", "NOT_ATTENTION")


def test_one_row_too_few_in_sums_over_hundreds_is_seen() -> None:
    maps, assembly = some_maps(CONTEXT), an_assembly()
    short = maps.copy()
    short[*READ, 200] = 0.0
    wrong = a_summary(maps)
    wrong.received.CopyFrom(a_summary(short).received)
    assert refusal_of(lambda: add(assembly, wrong)) == ("summary.received", "NOT_ATTENTION")


@pytest.mark.parametrize("part", ["summary", "rows"])
def test_rows_below_one_need_sinks(part: str) -> None:
    maps = some_maps(TOKENS, sinks=0.3)
    assert refusal_of(lambda: add(an_assembly(), MAKE[part](maps)))[1] == "NOT_ATTENTION"
    assembly = an_assembly(attention_sinks=True)
    add(assembly, MAKE[part](maps))
    assert logit_of(assembly) == pytest.approx(local_score(maps), abs=1e-5)
    above = some_maps(TOKENS, sinks=-0.01)
    assert refusal_of(lambda: add(an_assembly(attention_sinks=True), MAKE[part](above)))[1] == "NOT_ATTENTION"


def rounded_to_bfloat16(maps: Maps) -> Maps:
    return (maps.view(np.uint32) + 0x8000 & 0xFFFF0000).astype(np.uint32).view(np.float32)


def test_how_far_rows_may_be_from_one_depends_on_how_the_model_computes() -> None:
    """The attention of a model in bfloat16 is rounded before anybody sees it, that of one in float32 is not."""
    maps = rounded_to_bfloat16(some_maps(TOKENS))
    off = float(np.abs(maps.sum(-1) - 1).max())
    assert Rules(False, "float32").tolerance(TOKENS) < off < Rules(False, "bfloat16").tolerance(TOKENS)
    assert refusal_of(lambda: add(an_assembly(), some_rows(maps)))[1] == "NOT_ATTENTION"
    probe = a_probe(identity=replace(an_identity(), sample=SAMPLE))
    header = read_header(a_bfloat16_header((0.5, 0.25, 1.0)), probe, an_identity(), CONTEXT)
    add(Assembly(header, probe, most_bytes=MOST_BYTES), some_rows(maps))


def test_tolerances_hold_the_rounding_that_they_are_made_for() -> None:
    for tokens in (2, 50, CONTEXT):
        maps = some_maps(tokens, seed=tokens)
        for dtype, model in ((np.float32, "float32"), (np.float16, "float32")):
            off = np.abs(maps.astype(dtype).sum(-1, dtype=np.float64) - 1).max()
            assert off < Rules(False, model).tolerance(tokens, dtype) / 2
    assert Rules(False, "float32").tolerance(CONTEXT) < 5e-4, "control: not so wide that all would pass"
    assert Rules(False, "no such type").tolerance(5) == Rules(False, "bfloat16").tolerance(5)


# Shapes.


def reshaped(part: Any, name: str, shape: list[int]) -> Any:
    del getattr(part, name).shape[:]
    getattr(part, name).shape.extend(shape)
    return part


WRONG_SHAPES: list[tuple[str, str, list[int], str]] = [
    ("summary", "diagonal", [2, 3, 12], "summary.diagonal.data"),
    ("summary", "diagonal", [2, 39], "summary.diagonal.shape"),
    ("summary", "diagonal", [2, 3, 13, 1], "summary.diagonal.shape"),
    ("summary", "diagonal", [3, 2, 13], "summary.diagonal.shape"),
    ("summary", "diagonal", [2, -3, -13], "summary.diagonal.shape[1]"),
    ("summary", "diagonal", [0, 3, 13], "summary.diagonal.shape[0]"),
    ("summary", "received", [3, 2, 13], "summary.first_layer"),
    ("summary", "received", [1, 6, 13], "summary.first_head"),
    ("summary", "received", [2, 3, 2**62], "summary.received.data"),
    ("rows", "weights", [2, 3, 169], "rows.weights.shape"),
    ("rows", "weights", [2, 3, 169, 1], "rows.weights.shape"),
    ("rows", "weights", [3, 2, 13, 13], "rows.first_layer"),
    ("rows", "weights", [2, 3, 13, 12], "rows.weights.data"),
    ("rows", "weights", [2**62, 2**62, 2**62, 2**62], "rows.weights.data"),
    ("coarse", "diagonal", [3, 2, 13], "rows.diagonal.shape"),
    ("coarse", "diagonal", [2, 39], "rows.diagonal.shape"),
    ("coarse", "diagonal", [2, 3, 12], "rows.diagonal.data"),
]


@pytest.mark.parametrize(("part", "name", "shape", "field"), WRONG_SHAPES)
def test_a_wrong_shape_names_its_field(part: str, name: str, shape: list[int], field: str) -> None:
    wrong = reshaped(MAKE[part](some_maps(TOKENS)), name, shape)
    assert refusal_of(lambda: add(an_assembly(), wrong)) == (field, "INVALID_INPUT")


@pytest.mark.parametrize(
    ("part", "name", "dtype"),
    [
        ("summary", "diagonal", "FLOAT16"),  # a logarithm is taken of it
        ("summary", "received", "FLOAT16"),  # sums of 4,096 rows would go by steps of 4
        ("summary", "received", "BFLOAT16"),
        ("rows", "weights", "BFLOAT16"),
        ("coarse", "diagonal", "FLOAT16"),
        ("rows", "weights", "UNSPECIFIED"),
        ("rows", "weights", "INT32"),
    ],
)
def test_a_type_that_is_not_taken_names_its_field(part: str, name: str, dtype: str) -> None:
    wrong = MAKE[part](some_maps(TOKENS))
    getattr(wrong, name).dtype = f"DATA_TYPE_{dtype}"
    field = f"{part}.{name}.dtype".replace("coarse", "rows")
    assert refusal_of(lambda: add(an_assembly(), wrong)) == (field, "INVALID_INPUT")


@pytest.mark.parametrize(
    ("axis", "value"), [("layer", 1), ("layer", -1), ("head", 1), ("head", -1), ("head", 2**31 - 1)]
)
@pytest.mark.parametrize("part", ["summary", "rows"])
def test_a_place_outside_of_the_header_is_refused(part: str, axis: str, value: int) -> None:
    wrong = MAKE[part](some_maps(TOKENS))
    setattr(wrong, f"first_{axis}", value)
    assert refusal_of(lambda: add(an_assembly(), wrong)) == (f"{part}.first_{axis}", "INVALID_INPUT")


def test_whatever_is_sent_is_refused_by_name_or_sound() -> None:
    """Slices with anything in their fields end in a refusal that names a field of theirs, or are added."""
    kinds = st.sampled_from(["summary", "rows"])
    small = st.integers(-2, 5)
    shapes = st.lists(st.one_of(st.integers(0, 4), st.sampled_from([-1, 2**31, 2**62])), max_size=5)
    datas = st.one_of(st.binary(max_size=64), st.integers(0, 80).map(lambda n: b"\0" * 4 * n))
    tensors = st.builds(
        lambda dtype, shape, data: tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data),
        st.integers(0, 7),
        shapes,
        datas,
    )

    @settings(max_examples=400, deadline=None)
    @given(kinds, small, small, small, tensors, tensors)
    def check(part: str, layer: int, head: int, token: int, one: Any, other: Any) -> None:
        place = {"first_layer": layer, "first_head": head, "first_token": token}
        message = (
            detector_pb2.AttentionSummarySlice(**place, diagonal=one, received=other)
            if part == "summary"
            else detector_pb2.AttentionRowsSlice(**place, weights=one)
        )
        refusal = outcome_of(lambda: add(an_assembly(), message))
        if refusal is not None:
            assert refusal.code.name == "INVALID_ARGUMENT"
            assert refusal.field.startswith(f"{part}.")

    check()


def test_a_sound_slice_with_one_byte_changed_is_refused_by_name_or_near() -> None:
    """No flip of a bit in the numbers brings the score out of what the tolerances allow."""
    maps = some_maps(5)
    good = some_rows(maps).weights.data
    expected = local_score(maps)
    outcomes = {"refused": 0, "taken": 0}

    @settings(max_examples=300, deadline=None)
    @given(st.integers(0, len(good) - 1), st.integers(0, 7))
    def check(place: int, bit: int) -> None:
        part, assembly = some_rows(maps), an_assembly()
        part.weights.data = good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :]
        refusal = outcome_of(lambda: add(assembly, part))
        if refusal is None:
            outcomes["taken"] += 1
            assert logit_of(assembly) == pytest.approx(expected, abs=FLOAT16)
        else:
            outcomes["refused"] += 1
            assert refusal.field == "rows.weights"
            assert refusal.reason in ("NON_FINITE", "NOT_ATTENTION")

    check()
    assert min(outcomes.values()) > 10, "control: both happen"
