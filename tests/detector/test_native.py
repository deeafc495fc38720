"""Attention in C against the whole map in float64: of every shape, in pieces of every size, with any threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lapwing_detector import native
from lapwing_detector.capture import capture_attention
from lapwing_detector.native import attending, library
from lapwing_detector.scratch import Scratch
from tests.detector.native_cases import (
    SAME,
    SHAPES,
    Case,
    Inputs,
    attended,
    attended_row,
    errors,
    made,
    needs_compiler,
    needs_library,
    whole,
    wide_model,
)
from tests.detector.tiny_models import captured_forward, tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("two_threads")


@needs_library
@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_whole_map(any_build, shape, monkeypatch):
    monkeypatch.setattr(library, "installed", any_build)
    of = SHAPES[shape]
    given = made(of)
    # Scores are rounded at 6e-8 of their size, and weights are off by as much of themselves as scores are.
    assert max(errors(attended(of, given), whole(of, given))) < SAME * max(1.0, largest_score(of, given))


def largest_score(of: Case, given: Inputs) -> float:
    key = given.key.repeat_interleave(of.heads // of.shared, 1)
    return float((given.query @ key.transpose(-1, -2)).abs().max()) * abs(of.scaling)


@needs_library
def test_the_control_of_each_argument_is_far_from_the_whole_map():
    of = SHAPES["padding on the left"]
    given = made(of)
    exact = whole(of, given)
    starts = given.starts.clamp(min=1)
    for changes in ({"scaling": 0.31}, {"starts": starts}, {"counted": None}):
        assert max(errors(attended(of, given, **changes), exact)) > 1000 * SAME, changes
    turned = Inputs(given.query, given.key.flip(1), given.value.flip(1), given.starts, given.counted)
    assert max(errors(attended(of, turned), exact)) > 1000 * SAME


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "sizes",
    [
        {"PACKED_BYTES": 1},
        {"PACKED_BYTES": 2 * 90 * 16 * 4},
        {"WEIGHTS_BYTES": 1},
        {"BLOCK_ROWS": 10_000},
        {"UNITS": 1},
        {"UNITS": 1000},
        {"UNITS": 1000, "SUMS_BYTES": 1},
    ],
    ids=str,
)
def test_pieces_of_every_size_and_any_number_of_threads(sizes, threads, monkeypatch):
    for name, size in sizes.items():
        monkeypatch.setattr(attending, name, size)
    torch.set_num_threads(threads)
    scratch = Scratch()
    # Growing and shrinking shapes over the same memory.
    for of in (Case(), Case(rows=33, kind="left"), Case(rows=64, first=26), Case(rows=16, first=200), Case()):
        given = made(of)
        assert max(errors(attended(of, given, scratch), whole(of, given))) < SAME


@needs_library
@pytest.mark.parametrize("rounded", [attending.ROUNDED_BYTES, 100_000, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_output_only(dtype, rounded, monkeypatch):
    monkeypatch.setattr(attending, "ROUNDED_BYTES", rounded)
    of = SHAPES["one sequence"]
    given = made(of).to(dtype)
    output, *sums = attended(of, given)
    exact, *exact_sums = whole(of, given)
    assert output.dtype == dtype
    assert {one.dtype for one in sums} == {torch.float32}
    assert max(errors(tuple(sums), tuple(exact_sums))) < SAME
    assert errors((output,), (exact,))[0] <= torch.finfo(dtype).eps * float(exact.abs().max())


@needs_library
def test_the_same_bits_every_time():
    of = Case(batch=1, rows=300, width=16)
    given = made(of)
    first = attended(of, given)
    for _ in range(30):
        assert all(torch.equal(one, other) for one, other in zip(first, attended(of, given), strict=True))
    assert not torch.equal(first[2], attended(of, made(of, seed=1))[2])


@needs_library
@pytest.mark.parametrize("rows", [150, 1])
@pytest.mark.parametrize("group", [1, 5])
def test_no_number_is_written_or_read_beside_the_tensors(rows, group):
    of = Case(batch=1, heads=2 * group, shared=2, rows=rows, first=150 - rows, width=17, value_width=33)
    given, scratch = made(of), Scratch()
    attend, exact = attended_row if rows == 1 else attended, whole(of, given)
    attend(of, given, scratch)
    held = scratch._memory
    around = {name: torch.full((tensor.numel() + 2048,), torch.nan) for name, tensor in held.items()}
    for name, tensor in around.items():
        held[name] = tensor[1024:-1024]
    assert max(errors(attend(of, given, scratch), exact)) < SAME  # what was there before is not read
    for name, tensor in around.items():
        assert tensor[:1024].isnan().all(), name
        assert tensor[-1024:].isnan().all(), name
        assert not tensor[1024:-1024].isnan().all(), name


@needs_library
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["query", "key", "value"])
def test_what_is_not_finite_is_not_hidden(place, wrong):
    of = Case(batch=1, rows=150)
    given = made(of)
    getattr(given, place)[0, 0, 70, 3] = wrong
    output, diagonal, received = attended(of, given)
    broken = ~row_by_row(of, given).isfinite()
    assert broken.any()
    assert not output[broken].isfinite().any()
    assert output[:, :60].isfinite().all()  # rows that end well before it
    if place != "value":
        assert not diagonal.isfinite().all()
        assert not received.isfinite().all()


def row_by_row(of: Case, given: Inputs) -> Tensor:
    """The output in float64, each row from the columns that it sees alone."""
    group = of.heads // of.shared
    query, key, value = given.query.double(), given.key.double(), given.value.double()
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    rows = []
    for row in range(of.rows):
        scores = query[:, :, row, None] @ key[:, :, : row + 1].transpose(-1, -2) * of.scaling
        rows.append((scores.softmax(-1) @ value[:, :, : row + 1])[:, :, 0])
    return torch.stack(rows, 1)


@needs_library
@pytest.mark.parametrize("scaling", [0.0, -0.3])
def test_scores_without_or_with_the_other_sign(scaling):
    of = Case(rows=150, kind="left", scaling=scaling)
    given = made(of)
    assert max(errors(attended(of, given), whole(of, given))) < SAME


@needs_library
@pytest.mark.parametrize("rows", [1, 40])
def test_scores_far_beyond_what_exp_can_take(rows):
    of = Case(batch=1, heads=1, shared=1, rows=rows, first=40 - rows, width=32, value_width=32, scaling=1.0)
    given = made(of)
    given.query[:] = 65536.0
    given.key[:] = 65536.0 * torch.linspace(0.1, 1.0, 40)[:, None]  # each is far above all before it
    output, diagonal, received = attended_row(of, given) if rows == 1 else attended(of, given)
    assert torch.equal(output, given.value[:, :, of.first :].transpose(1, 2))
    assert bool((diagonal == 1).all())
    assert received.tolist() == [[[0.0] * of.first + [1.0] * rows]]


@needs_library
@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("threads", [1, 2, 16, 128])
@pytest.mark.parametrize("columns", [512, 8192, 32768])
@pytest.mark.parametrize(("heads", "shared", "width"), [(32, 8, 128), (32, 32, 128), (71, 1, 64), (16, 4, 64)])
def test_what_it_keeps_for_itself_is_bounded(lanes, threads, columns, heads, shared, width):
    built, group = replace(library.installed(), lanes=lanes, rows={8: 6, 16: 12}[lanes]), heads // shared
    together = max(1, min(shared, attending.PACKED_BYTES // (4 * columns * 2 * width)))
    how = attending.plan(built, threads, together, group, columns, columns, width, width)
    packed = together * columns * 2 * width
    assert 1 <= how.threads <= threads
    assert how.shares >= 1
    numbers = packed + how.threads * how.each + how.shares * together * group * columns
    assert 4 * numbers < 64e6 - attending.ROUNDED_BYTES
    assert packed > 4e6 or together == shared  # and it is not divided further than it must be


@needs_library
def test_weights_too_small_for_a_number_are_zero():
    of = Case(batch=1, heads=1, shared=1, rows=40, width=2, value_width=2, scaling=1.0)
    given = made(of)
    given.query[:] = 1.0
    given.key[:] = 0.0
    given.key[:, :, 5] = 200.0  # from its row on all others weigh e^-400
    output, diagonal, received = attended(of, given)
    assert (diagonal[0, 0, 6:] == 0).all()
    assert received[0, 0, 5] == 35
    assert torch.equal(output[0, 6:, 0], given.value[0, 0, 5].expand(34, 2))


@needs_library
def test_what_it_takes(monkeypatch):
    query, key, value = (torch.randn(1, 2, native.LEAST_ROWS, 8) for _ in range(3))
    with torch.no_grad():
        assert native.supports(query, key, value)
        assert not native.supports(query[:, :, 1:], key, value)
        assert not native.supports(query.double(), key.double(), value.double())
        assert not native.supports(query, key.bfloat16(), value)
        assert not native.supports(query.to("meta"), key.to("meta"), value.to("meta"))
        for instructions, taken in ((False, True), (True, False)):
            monkeypatch.setattr(native, "multiplies_bfloat16", lambda found=instructions: found)
            assert native.supports(query.bfloat16(), key.bfloat16(), value.bfloat16()) is taken
            assert native.supports(query.half(), key.half(), value.half())
    assert not native.supports(query, key, value)  # gradients are recorded


@needs_library
def test_models_are_read_by_it_where_it_knows_their_attention(monkeypatch):
    rows: list[int] = []

    def noting(real):
        def noted(query, *rest, **more):
            rows.append(query.shape[2])
            return real(query, *rest, **more)

        return noted

    monkeypatch.setattr(native, "attend", noting(native.attend))
    monkeypatch.setattr(native, "attend_row", noting(native.attend_row))
    model, ids = tiny_model("llama"), token_ids(2, 40)
    layers = model.config.num_hidden_layers
    captured_forward(model, ids)
    assert rows == [40] * layers
    rows.clear()
    with torch.enable_grad(), capture_attention(model):
        model(ids)
    captured_forward(tiny_model("gemma2"), ids)  # caps its scores
    captured_forward(tiny_model("gpt_oss"), ids)  # has sinks
    assert rows == []
    wide = wide_model()
    padded = torch.ones_like(ids)
    padded[1, :7] = 0
    for mask in (None, padded):
        rows.clear()
        with capture_attention(wide) as captured:
            wide.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert captured.summaries()[0].diagonal.shape[-1] == 44
        assert rows == [40, 40] + 2 * 4 * [1]  # the row of the last token is computed when it is asked for
