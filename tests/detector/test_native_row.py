"""One row of attention in C, as it is decoded: against the whole map in float64, and in models that write."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from lapwing_detector import native
from lapwing_detector.capture import capture_attention
from lapwing_detector.native import library
from lapwing_detector.scratch import Scratch
from lapwing_detector.summary import AttentionSummary
from tests.detector.native_cases import (
    SAME,
    Case,
    Inputs,
    attended_row,
    errors,
    made,
    needs_compiler,
    needs_library,
    whole,
    wide_model,
)
from tests.detector.tiny_models import token_ids

pytestmark = pytest.mark.usefixtures("two_threads")

ROWS = {
    "plain": Case(batch=1, heads=16, shared=4, rows=1, first=299, width=64, value_width=64, scaling=0.125),
    "alone": Case(rows=1, width=16, value_width=32),
    "two columns": Case(rows=1, first=1, width=16, value_width=32),
    "an odd number of columns": Case(rows=1, first=126, width=16, value_width=32),
    "no head shares": Case(heads=3, rows=1, first=50, width=16, value_width=32),
    "all share one": Case(heads=71, shared=1, rows=1, first=200, width=16, value_width=32),
    "wide keys": Case(heads=2, shared=1, rows=1, first=140, width=192, value_width=128, scaling=0.07),
    "odd widths": Case(rows=1, first=77, width=23, value_width=45),
    "sharp": Case(rows=1, first=200, width=32, value_width=32, scaling=1.0, spread=3.0),
    "padded": Case(batch=4, rows=1, first=150, width=16, value_width=32, kind="newest"),
}


@needs_library
@needs_compiler
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("counts", [None, True, False])
def test_one_row_equals_the_whole_map(any_build, shape, counts, monkeypatch):
    monkeypatch.setattr(library, "installed", any_build)
    of = ROWS[shape]
    counted = None if counts is None else torch.tensor([[counts]] * of.batch)
    given = made(of)
    given = given if of.kind == "newest" else replace(given, counted=counted)
    cache = torch.zeros(2, of.batch, of.shared, of.first + 5, max(of.width, of.value_width))  # of a larger one, a part
    key, value = cache[0, :, :, : of.first + 1, : of.width], cache[1, :, :, : of.first + 1, : of.value_width]
    key.copy_(given.key)
    value.copy_(given.value)
    with torch.no_grad():
        assert native.supports_row(given.query, key, value) is (of.width >= 16 and of.value_width >= 32)
    given, exact = replace(given, key=key, value=value), whole(of, given)
    assert max(errors(attended_row(of, given), exact)) < SAME * of.spread**2
    other = attended_row(of, given, scaling=of.scaling * 1.1)
    assert of.first == 0 or max(errors(other, exact)) > 100 * SAME
    if of.kind == "newest":
        assert max(errors(attended_row(of, given, starts=None), exact)) > 100 * SAME
        assert max(errors(attended_row(of, given, counted=None), exact)) < SAME  # the only such row sees nothing
        every = torch.zeros(1, 1, dtype=torch.int32)  # one for all sequences
        assert max(errors(attended_row(of, given, starts=every), whole(of, replace(given, starts=every)))) < SAME


@needs_library
@needs_compiler
@pytest.mark.parametrize("shape", ROWS)
def test_one_row_of_bfloat16_rounds_the_output_only(any_build, shape, monkeypatch):
    monkeypatch.setattr(library, "installed", any_build)
    of = ROWS[shape]
    given = made(of).to(torch.bfloat16)
    output, *sums = attended_row(of, given)
    exact, *exact_sums = whole(of, given)
    assert output.dtype == torch.bfloat16
    assert max(errors(tuple(sums), tuple(exact_sums))) < SAME * of.spread**2
    nearest = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + SAME * of.spread**2
    assert ((output.double() - exact).abs() <= nearest).all()
    cut_off = (exact.float().view(torch.int32) & -65536).view(torch.float32)
    further = (cut_off.double() - exact).abs() > nearest  # off than what is rounded to the nearest
    assert of.first == 0 or further.any()


@needs_library
def test_bfloat16_between_two_is_rounded_to_the_even_one():
    one, neighbours = 0x3F80, torch.arange(33)
    near = (one + neighbours).to(torch.int16).view(torch.bfloat16)
    value = torch.stack([near[:-1], near[1:]])[None, None]  # with equal weights every mean lies between two
    same = torch.zeros(1, 1, 2, 16, dtype=torch.bfloat16)
    given = Inputs(same[:, :, :1], same, value, None, None)
    output, _, _ = attended_row(Case(batch=1, heads=1, shared=1, rows=1, first=1), given)
    even = one + neighbours[:-1] + neighbours[:-1] % 2
    assert output[0, 0, 0].view(torch.int16).tolist() == even.tolist()


@needs_library
def test_what_is_not_finite_in_bfloat16_stays_so():
    of = Case(batch=1, rows=1, first=9, width=16, value_width=32)
    given = made(of).to(torch.bfloat16)
    given.value[0, 0, 4, 7:10] = torch.tensor([torch.nan, torch.inf, torch.finfo(torch.bfloat16).max])
    output = attended_row(of, given)[0][0, 0].float()
    assert output[:2, 7].isnan().all()
    assert (output[:2, 8] == torch.inf).all()
    assert output[:2, 9].isfinite().all()
    assert output[2:].isfinite().all()  # heads of other values


@needs_library
@pytest.mark.parametrize("heads", [[5], [0, 1, 4], [3, 2], list(range(6))])
def test_some_heads_of_one_row(heads):
    of = Case(rows=1, first=60, width=16, value_width=32)
    given = made(of)
    output, diagonal, received = whole(of, given)
    newest, row = torch.zeros(2, of.batch, len(heads), of.first + 1)
    found = native.attend_row(
        given.query,
        given.key,
        given.value,
        diagonal=newest,
        received=row,
        tokens=of.first + 1,
        starts=None,
        counted=None,
        scaling=of.scaling,
        heads=torch.tensor(heads, dtype=torch.int32),
        scratch=Scratch(),
    )
    assert max(errors((found, newest[..., -1:], row), (output, diagonal[:, heads], received[:, heads]))) < SAME
    assert max(errors((row,), (received[:, [(head + 1) % 6 for head in heads]],))) > 100 * SAME


@needs_library
def test_one_row_of_few_heads_is_left_to_all_threads():
    query, key, value = (torch.randn(1, 2, columns, 32) for columns in (1, 5, 5))
    with torch.no_grad():
        torch.set_num_threads(4)
        assert native.supports_row(query, key, value)
        assert not native.supports_row(query, key[..., :3], value)
        assert not native.supports_row(query, key, value[..., :7])
        assert not native.supports_row(query, key, value.transpose(2, 3).contiguous().transpose(2, 3))
        assert native.supports_row(query.bfloat16(), key.bfloat16(), value.bfloat16())
        for place in range(3):
            mixed = [query, key, value]
            mixed[place] = mixed[place].bfloat16()
            assert not native.supports_row(*mixed)
        assert not native.supports_row(query.half(), key.half(), value.half())
        torch.set_num_threads(5)
        assert not native.supports_row(query, key, value)


@needs_library
def test_a_model_in_bfloat16_is_decoded_by_it_and_read_as_by_torch(monkeypatch):
    model, ids, rows = wide_model().bfloat16(), token_ids(2, 20), []
    real = native.attend_row
    monkeypatch.setattr(native, "attend_row", lambda query, *rest, **more: rows.append(1) or real(query, *rest, **more))

    def read() -> list[AttentionSummary]:
        with torch.inference_mode(), capture_attention(model) as captured:
            cache = DynamicCache(config=model.config)
            for part in ids.split([12] + 8 * [1], 1):
                model(part, past_key_values=cache)
        return captured.summaries()

    found = read()
    assert len(rows) == 8 * 2
    monkeypatch.setattr(native, "available", lambda: False)
    expected = read()
    assert len(rows) == 8 * 2
    for mine, other in zip((one.received[0] for one in found), (one.received[0] for one in expected), strict=True):
        # Of the first layer only: what comes to the second one was rounded to 1/256 in another order.
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)
        assert not np.allclose(mine, np.roll(other, 1, axis=-1), rtol=1e-2)


@needs_library
@pytest.mark.parametrize("heads", [None, {0: [1], 1: [0, 3]}])
def test_what_a_model_writes_with_padding_equals_the_same_text_read_by_torch(heads, monkeypatch):
    model, ids = wide_model(), token_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with capture_attention(model, heads=heads) as captured:
        written = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None)
    found = captured.summaries()
    monkeypatch.setattr(native, "available", lambda: False)
    for place, padding in ((0, 0), (1, 7)):
        with capture_attention(model, heads=heads) as captured:
            model(written[place : place + 1, padding:])
        [expected] = captured.summaries()
        np.testing.assert_allclose(found[place].diagonal, expected.diagonal, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[place].received, expected.received, rtol=1e-4, atol=1e-5)
    with capture_attention(model, heads=heads) as captured:
        model(written[1:])  # the control: padding is read as text
    other = captured.summaries()[0].diagonal[:, :, 7:]
    assert not np.allclose(found[1].diagonal, other, rtol=1e-2, equal_nan=True)
