"""Attention maps that somebody might send, and the messages that carry them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
from engine_fakes import CONTEXT, a_probe, an_identity
from numpy.typing import NDArray

from lapwing.v1 import detector_pb2, tensor_pb2
from lapwing_detector.probe import Probe
from lapwing_detector.summary import AttentionSummary
from lapwing_server.answers import identity_message
from lapwing_server.attention_assembly import Assembly
from lapwing_server.attention_header import read_header
from lapwing_server.refusal import Refusal

LAYERS, HEADS = (1, 2), 3
"""Those of the probe of the fakes, which reads all heads but the first one of layer 1."""

READ_HEADS = 5
MOST_BYTES = 2**20

FLOAT16 = 10 * 2**-11
"""How near a score comes by rows in float16: each of them rounds a weight, and so each mean of weights, by up to 2^-11;
the weights of the probe add up to 9.3."""

Maps = NDArray[Any]
Request = detector_pb2.ScoreAttentionRequest
DTYPES = {"float32": tensor_pb2.DATA_TYPE_FLOAT32, "float16": tensor_pb2.DATA_TYPE_FLOAT16}


def some_maps(tokens: int, seed: int = 0, sinks: float = 0.0) -> Maps:
    """(layers, heads, tokens, tokens) float32, causal; with sinks every row loses that share to them."""
    scores = np.random.default_rng(seed).normal(size=(len(LAYERS), HEADS, tokens, tokens)) * 2
    scores[..., np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) * (1 - sinks)).astype(np.float32)


def summary_of(maps: Maps, layers: tuple[int, ...] = LAYERS) -> AttentionSummary:
    """What a capture of these maps would have summed up."""
    diagonal = np.ascontiguousarray(np.diagonal(maps, axis1=2, axis2=3))
    return AttentionSummary(diagonal, maps.sum(axis=2, dtype=np.float64).astype(np.float32), layers)


def local_score(maps: Maps, probe: Probe | None = None) -> float:
    """The logit by the library."""
    return (probe or a_probe()).score(summary_of(maps))[0]


def tensor(values: NDArray[Any]) -> tensor_pb2.Tensor:
    dtype = DTYPES.get(values.dtype.name, tensor_pb2.DATA_TYPE_UNSPECIFIED)
    return tensor_pb2.Tensor(dtype=dtype, shape=values.shape, data=np.ascontiguousarray(values).tobytes())


def a_header(prompt_tokens: int = 2, **fields: Any) -> detector_pb2.AttentionHeader:
    known = {"model": identity_message(an_identity()), "layers": LAYERS, "heads": HEADS, "prompt_tokens": prompt_tokens}
    return detector_pb2.AttentionHeader(**known | fields)


SAMPLE = (0.5, 0.25 + 2**-11, 1.0)
"""The second one is rounded by bfloat16."""


def a_bfloat16_header(sample: tuple[float, ...], **fields: Any) -> detector_pb2.AttentionHeader:
    values = np.array(sample, np.float32)
    model = identity_message(replace(an_identity(), dtype="bfloat16", weights=sha256(values.tobytes()).hexdigest()))
    return a_header(model=model, weight_sample=tensor(values), **fields)


def a_summary(
    maps: Maps, first: int = 0, last: int | None = None, layers: slice = slice(0, 2), heads: slice = slice(0, HEADS)
) -> detector_pb2.AttentionSummarySlice:
    """The sums over some rows of some heads."""
    last = maps.shape[2] if last is None else last
    rows = maps[layers, heads, first:last, :last]
    return detector_pb2.AttentionSummarySlice(
        first_layer=layers.start,
        first_head=heads.start,
        first_token=first,
        diagonal=tensor(np.diagonal(rows, first, 2, 3)),
        received=tensor(rows.sum(axis=2)),
    )


def some_rows(
    maps: Maps, first: int = 0, last: int | None = None, layers: slice = slice(0, 2), heads: slice = slice(0, HEADS)
) -> detector_pb2.AttentionRowsSlice:
    """Some rows of some heads."""
    last = maps.shape[2] if last is None else last
    return detector_pb2.AttentionRowsSlice(
        first_layer=layers.start,
        first_head=heads.start,
        first_token=first,
        weights=tensor(maps[layers, heads, first:last, :last]),
    )


def coarse_rows(
    maps: Maps, first: int = 0, last: int | None = None, layers: slice = slice(0, 2), heads: slice = slice(0, HEADS)
) -> detector_pb2.AttentionRowsSlice:
    """The same in float16, with the diagonal in float32 beside it."""
    part = some_rows(maps.astype(np.float16), first, last, layers, heads)
    part.diagonal.CopyFrom(a_summary(maps, first, last, layers, heads).diagonal)
    return part


def places() -> Iterator[tuple[slice, slice]]:
    """Every head by itself, the last one first: order matters within a head only."""
    for layer in reversed(range(len(LAYERS))):
        for head in reversed(range(HEADS)):
            yield slice(layer, layer + 1), slice(head, head + 1)


def requests(*parts: Any) -> Iterator[Request]:
    """Parts as the messages of a stream."""
    names = {
        detector_pb2.AttentionHeader: "header",
        detector_pb2.AttentionSummarySlice: "summary",
        detector_pb2.AttentionRowsSlice: "rows",
        detector_pb2.AttentionScoreNow: "score_now",
    }
    return (Request(**{names[type(part)]: part}) for part in parts)


def score_now() -> detector_pb2.AttentionScoreNow:
    return detector_pb2.AttentionScoreNow()


def a_shadow(**changes: Any) -> Probe:
    """A probe that reads the one head that the other one does not."""
    selected = np.zeros((len(LAYERS), HEADS), bool)
    selected[0, 0] = True
    probe = a_probe("shadow-probe", selected=selected, weights=np.ones((2, 3, 3), np.float32) * selected[..., None])
    return replace(probe, **changes)


def an_assembly(
    most_bytes: int = MOST_BYTES, shadows: tuple[Probe, ...] = (), probe: Probe | None = None, **fields: Any
) -> Assembly:
    probe = probe or a_probe()
    header = read_header(a_header(**fields), probe, an_identity(), CONTEXT)
    return Assembly(header, probe, shadows, most_bytes=most_bytes)


def add(assembly: Assembly, part: Any) -> None:
    if isinstance(part, detector_pb2.AttentionSummarySlice):
        assembly.add_summary(part)
    else:
        assembly.add_rows(part)


def logit_of(assembly: Assembly, probe: Probe | None = None) -> float:
    probe = probe or a_probe()
    summary = assembly.summary(probe, assembly.require_whole())
    assert summary is not None
    return probe.score(summary)[0]


def outcome_of(call: Callable[[], Any]) -> Refusal | None:
    """How it was refused; None when it was not."""
    try:
        call()
    except Refusal as refusal:
        return refusal
    return None


def refusal_of(call: Callable[[], Any]) -> tuple[str, str]:
    """Field and reason."""
    refusal = outcome_of(call)
    assert refusal is not None, "it was taken"
    return refusal.field, refusal.reason


def changed(part: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """A slice whose array `name` was changed."""
    message = getattr(part, name)
    dtype = np.float16 if message.dtype == tensor_pb2.DATA_TYPE_FLOAT16 else np.float32
    array = np.frombuffer(message.data, dtype).reshape(tuple(message.shape)).copy()
    array = result if (result := change(array)) is not None else array
    message.CopyFrom(tensor(array))
    return part


def put(*place: Any, value: float) -> Callable[[Any], None]:
    def change(array: Any) -> None:
        array[place] = value

    return change


def more(*place: Any, by: float) -> Callable[[Any], None]:
    def change(array: Any) -> None:
        array[place] += by

    return change


READ = (1, 1)
"""A head that the probe reads."""

UNREAD = (0, 0)

MAKE = {"summary": a_summary, "rows": some_rows, "coarse": coarse_rows}


def a_logarithmic_probe() -> Probe:
    """One that takes the mean logarithm of the diagonal of the heads that the other one reads."""
    weights = np.where(a_probe().selected, 0.25, 0.0).astype(np.float32)[..., None]
    return a_probe(features=("attention_score.v1",), weights=weights)


assert (len(LAYERS), HEADS) == a_probe().selected.shape
