"""Attention in C against the whole map in float64: of every shape, in pieces of every size, with any threads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lapwing_detector import native
from lapwing_detector.capture import capture_attention
from lapwing_detector.native import build, library
from lapwing_detector.scratch import Scratch
from tests.detector.tiny_models import captured_forward, tiny_model, token_ids

SAME = 2e-6
"""Of each number, or of itself where it is larger than 1: float32 sums of at most 330, each rounded at 6e-8."""

needs_library = pytest.mark.skipif(not native.available(), reason="attention in C is not built, or not for this CPU")
needs_compiler = pytest.mark.skipif(
    not (build.here() and any(map(shutil.which, ("cc", "gcc", "clang")))), reason="there is no C compiler"
)

BUILDS = {
    "installed": None,
    "wide": ("-mavx2", "-mfma", "-Wno-psabi", "-DLANES=16", "-DROWS=12"),
    "narrow": ("-DLANES=4", "-DROWS=2"),
}
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


def errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    pairs = zip(found, expected, strict=True)
    return [float(((one - other) / other.abs().clamp(min=1)).abs().max()) for one, other in pairs]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=BUILDS)
def any_build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], object]:
    flags, kind = BUILDS[request.param], library.fitting()
    if flags is None or kind is None:
        return native._library
    path = build.build(kind, tmp_path_factory.mktemp("built") / f"{request.param}.so", flags)
    loaded = library.load(kind, path)
    return lambda: loaded


@needs_library
@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_whole_map(any_build, shape, monkeypatch):
    monkeypatch.setattr(native, "_library", any_build)
    of = SHAPES[shape]
    given = made(of)
    exact = whole(of, given)
    # scores are rounded at 6e-8 of their size, and what is off by that is off by as much of itself
    largest = float(given.query.abs().amax() * given.key.abs().amax() * of.width * of.scaling)
    assert max(errors(attended(of, given), exact)) < SAME * max(1.0, of.spread * largest / 4)


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
        {"TOGETHER_BYTES": 1},
        {"TOGETHER_BYTES": 2 * 90 * 3 * 16 * 4},
        {"WEIGHTS_BYTES": 1},
        {"BLOCK_ROWS": 10_000},
        {"UNITS": 1},
        {"UNITS": 1000},
    ],
    ids=str,
)
def test_pieces_of_every_size_and_any_number_of_threads(sizes, threads, monkeypatch):
    for name, size in sizes.items():
        monkeypatch.setattr(native, name, size)
    torch.set_num_threads(threads)
    scratch = Scratch()
    # Growing and shrinking shapes over the same memory.
    for of in (Case(), Case(rows=33, kind="left"), Case(rows=64, first=26), Case(rows=16, first=200), Case()):
        given = made(of)
        assert max(errors(attended(of, given, scratch), whole(of, given))) < SAME


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_output_only(dtype):
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
def test_no_number_is_written_or_read_beside_the_tensors():
    of = Case(batch=1, rows=150, width=8)
    given, scratch = made(of), Scratch()
    attended(of, given, scratch)
    held = scratch._memory
    around = {name: torch.full((tensor.numel() + 2048,), torch.nan) for name, tensor in held.items()}
    for name, tensor in around.items():
        held[name] = tensor[1024:-1024]
    assert max(errors(attended(of, given, scratch), whole(of, given))) < SAME  # what was there before is not read
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
}


@needs_library
@needs_compiler
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("counts", [None, True, False])
def test_one_row_equals_the_whole_map(any_build, shape, counts, monkeypatch):
    monkeypatch.setattr(native, "_library", any_build)
    of = ROWS[shape]
    counted = None if counts is None else torch.tensor([[counts]] * of.batch)
    given = replace(made(of), counted=counted)
    cache = torch.zeros(2, of.batch, of.shared, of.first + 5, max(of.width, of.value_width))  # of a larger one, a part
    key, value = cache[0, :, :, : of.first + 1, : of.width], cache[1, :, :, : of.first + 1, : of.value_width]
    key.copy_(given.key)
    value.copy_(given.value)
    assert native.supports_row(given.query, key, value) is not torch.is_grad_enabled()
    found = native.attend_row(given.query, key, value, counted=counted, scaling=of.scaling, scratch=Scratch())
    assert max(errors(found, whole(of, given))) < SAME * of.spread**2
    other = native.attend_row(given.query, key, value, counted=counted, scaling=of.scaling * 1.1, scratch=Scratch())
    assert of.first == 0 or max(errors(other, whole(of, given))) > 100 * SAME


@needs_library
def test_one_row_of_few_heads_is_left_to_all_threads():
    query, key, value = (torch.randn(1, 2, columns, 32) for columns in (1, 5, 5))
    with torch.no_grad():
        torch.set_num_threads(4)
        assert native.supports_row(query, key, value)
        assert not native.supports_row(query, key[..., :3], value)
        assert not native.supports_row(query, key, value[..., :7])
        assert not native.supports_row(query, key, value.transpose(2, 3).contiguous().transpose(2, 3))
        assert not native.supports_row(query.bfloat16(), key.bfloat16(), value.bfloat16())
        torch.set_num_threads(5)
        assert not native.supports_row(query, key, value)


@needs_library
def test_what_it_takes():
    query, key, value = (torch.randn(1, 2, native.LEAST_ROWS, 8) for _ in range(3))
    with torch.no_grad():
        assert native.supports(query, key, value)
        assert not native.supports(query[:, :, 1:], key, value)
        assert not native.supports(query.double(), key.double(), value.double())
        assert not native.supports(query, key.bfloat16(), value)
        assert not native.supports(query.to("meta"), key.to("meta"), value.to("meta"))
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
    wide = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    with capture_attention(wide) as captured:
        wide.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert captured.summaries()[0].diagonal.shape[-1] == 44
    assert rows == [40, 40] + 2 * 4 * [1]  # the row of the last token is computed when it is asked for


@needs_compiler
def test_a_compiler_means_a_library():
    assert native.available() or library.fitting() is None


def test_a_library_of_another_source_is_refused(tmp_path, monkeypatch):
    with pytest.raises(library.Missing, match=r"is not built .*-m lapwing_detector.native does so"):
        library.load("avx2", tmp_path / "none.so")
    if not build.here():
        return
    path = build.build("avx2", tmp_path / "built.so", BUILDS["narrow"])
    assert library.load("avx2", path).lanes == 4
    monkeypatch.setattr(library, "digest", lambda: "0" * 64)
    with pytest.raises(library.Missing, match="built from another version of its source"):
        library.load("avx2", path)


def test_without_a_library_torch_does_the_same_and_says_so_once(monkeypatch, recwarn):
    monkeypatch.setattr(native, "fitting", lambda: "avx2")
    monkeypatch.setattr(native, "load", _missing)
    native._library.cache_clear()
    native.available.cache_clear()
    try:
        assert not native.available()
        assert not native.available()
    finally:
        native._library.cache_clear()
        native.available.cache_clear()
    assert [str(one.message) for one in recwarn if one.category is native.NativeMissing] == [
        "not built, so torch alone captures attention, more slowly"
    ]


def _missing(kind: str) -> library.Library:
    raise library.Missing("not built")


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-compiler", "no-such-compiler does not start: No such file"), ("false", "false refuses attention.c")],
)
def test_a_failed_build_leaves_what_was_there(compiler, message, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    path = tmp_path / "built.so"
    path.write_text("as it was")
    with pytest.raises(build.CannotBuild, match=message):
        build.build("avx2", path)
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_compiler_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.CannotBuild, match="install gcc, or set CC"):
        build.build("avx2", Path(tmp_path, "built.so"))
