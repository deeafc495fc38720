"""The comparisons with what is captured notice when one mechanism is left out of the code that they test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lapwing_detector import attention, capture, forward, generation_run, native, reading, strips
from lapwing_detector.attention import attend
from lapwing_detector.capture import Captured, capture_attention
from lapwing_detector.layers import AttentionLayer
from lapwing_detector.sequences import Sums
from lapwing_detector.summary import AttentionSummary
from tests.detector.captures import (
    SAME_MAP,
    SAMPLED_PAD,
    STEP_BY_STEP,
    error_with_a_new_cache,
    generation_error,
    largest_tensor,
    other_ends_error,
    padding_error,
    rounding_error,
)
from tests.detector.tiny_models import (
    LONG,
    WINDOW,
    captured_forward,
    difference,
    eager_forward,
    long_model,
    tiny_model,
    token_ids,
)

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


def error_of(family: str, length: int = 60) -> float:
    ids = token_ids(1, length)
    return difference(captured_forward(tiny_model(family), ids)[0], eager_forward(tiny_model(family), ids))


def with_changed(**changes: object) -> Any:
    return lambda query, key, value, **rest: attend(query, key, value, **{**rest, **changes})


def test_control_not_causal(breaking: pytest.MonkeyPatch) -> None:
    assert error_of("llama") < SAME_MAP
    breaking.setattr(native, "available", lambda: False)
    breaking.setattr(attention._Layer, "_hide", lambda self, scores, strip: None)
    assert error_of("llama") > 0.01


def test_control_mask_function_that_is_not_causal_is_refused(breaking: pytest.MonkeyPatch) -> None:
    everything = torch.ones(1, 1, 60, 60, dtype=torch.bool)
    breaking.setattr("lapwing_detector.switch.sdpa_mask", lambda **_: everything)
    with pytest.raises(capture.CaptureError, match="later"):
        error_of("llama")


def test_control_scale(breaking: pytest.MonkeyPatch) -> None:
    breaking.setattr(reading, "attend", with_changed(scaling=1.0))
    assert error_of("llama") > 0.01
    assert error_of("gpt2") > 0.01


def test_control_scale_of_another_layer(breaking: pytest.MonkeyPatch) -> None:
    breaking.setattr(reading, "attend", with_changed(scaling=0.5))
    assert error_of("gpt2") > 0.01  # it scales by the layer; 0.5 is right for the first one only


def test_control_softcap(breaking: pytest.MonkeyPatch) -> None:
    breaking.setattr(reading, "attend", with_changed(softcap=None))
    assert error_of("gemma2") > 0.01


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_control_window(breaking: pytest.MonkeyPatch, family: str) -> None:
    breaking.setattr(reading, "attend", with_changed(mask=None, starts=None))
    assert error_of(family, WINDOW) < SAME_MAP  # within the window nothing is lost
    assert error_of(family, WINDOW + 1) > 1e-3


def test_control_order_of_key_value_heads(breaking: pytest.MonkeyPatch) -> None:
    breaking.setattr(
        reading, "attend", lambda query, key, value, **rest: attend(query, key.flip(1), value.flip(1), **rest)
    )
    assert error_of("llama") > 0.01


@pytest.mark.parametrize("whole_mask", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_control_padding_counted(breaking: pytest.MonkeyPatch, side: str, whole_mask: bool) -> None:
    real = forward.Forward.report

    def all_count(self: forward.Forward, *call: object) -> forward.Place:
        place = real(self, *call)  # type: ignore[arg-type]
        return replace(place, counted=None)

    breaking.setattr(forward.Forward, "report", all_count)
    # On the right, padding looks like real rows; on the left it sees nothing, and attends to everything.
    if side == "left":  # in C only to what lies before it, which is padding, too
        breaking.setattr(native, "available", lambda: False)
    assert padding_error(tiny_model("llama"), side, whole_mask) > 0.01


def test_control_all_keys_of_a_static_cache(breaking: pytest.MonkeyPatch) -> None:
    real = forward.Forward.report

    def uncropped(self: forward.Forward, layer: AttentionLayer, query: Any, key: Any, mask: Any) -> forward.Place:
        place = real(self, layer, query, key, mask)
        return replace(place, columns=key.shape[2], mask=mask)

    prompts = [token_ids(1, 12)[0]]
    assert generation_error(tiny_model("llama"), prompts, cache_implementation="static")[0] < STEP_BY_STEP
    breaking.setattr(forward.Forward, "report", uncropped)
    assert generation_error(tiny_model("llama"), prompts)[0] < STEP_BY_STEP  # a dynamic cache has no others
    with pytest.raises(RuntimeError):  # the sums have more columns than the text has tokens
        generation_error(tiny_model("llama"), prompts, cache_implementation="static")


def test_control_sums_in_bfloat16(breaking: pytest.MonkeyPatch) -> None:
    breaking.setattr(torch, "promote_types", lambda one, other: one)
    assert rounding_error() > 1e-3


def test_control_one_block_is_the_map(breaking: pytest.MonkeyPatch) -> None:
    for size in ("STRIP_BYTES", "STRIP_ROWS", "MOST_ROWS", "TOGETHER_BYTES"):
        breaking.setattr(strips, size, 2**40)
    assert largest_tensor(600) >= 600 * 600


def test_control_a_sampled_pad_token_ends_nothing(breaking: pytest.MonkeyPatch) -> None:
    real = generation_run.Endings.__call__

    def pad_ends(self: generation_run.Endings, ids: torch.Tensor, scores: object, **others: object) -> torch.Tensor:
        ended = real(self, ids, scores, **others)
        self.ends = torch.where(ids[:, -1] == SAMPLED_PAD, self.ends.clamp(max=ids.shape[1] - 1), self.ends)
        return ended

    breaking.setattr(generation_run.Endings, "__call__", pad_ends)
    assert other_ends_error("criteria") > 0.01


def test_control_ends_forgotten_with_the_cache(breaking: pytest.MonkeyPatch) -> None:
    real = forward.Forward.__init__

    def forget(self: forward.Forward, past: int, batch: int | None, ends: torch.Tensor | None) -> None:
        real(self, past, batch, None if past == 0 else ends)

    breaking.setattr(forward.Forward, "__init__", forget)
    assert error_with_a_new_cache() > 0.01


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_control_other_frequencies_in_the_cache(breaking: pytest.MonkeyPatch, kind: str) -> None:
    breaking.setattr(capture, "require_same_frequencies", lambda *_: None)
    model, ids = long_model(kind), token_ids(1, 2 * LONG)
    with capture_attention(model) as captured, torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values if kind == "dynamic" else model(ids[:, :LONG]).past_key_values
        model(ids[:, cache.get_seq_length() :], past_key_values=cache)
    assert difference(captured.summaries()[0], captured_forward(long_model(kind), ids)[0]) > 1e-3


def test_control_finished_rows_counted(breaking: pytest.MonkeyPatch) -> None:
    prompts = [token_ids(1, n, seed=n)[0] for n in (12, 3, 30, 20)]
    breaking.setattr(Captured, "_ends", lambda self: None)
    error, lengths = generation_error(tiny_model("llama"), prompts, do_sample=True)
    assert len(lengths) > 1
    assert error > 0.01


def test_control_absolute_positions_in_a_sliding_cache(breaking: pytest.MonkeyPatch) -> None:
    def from_the_first_column(self: Sums, diagonal: torch.Tensor, received: torch.Tensor, tokens: int) -> None:
        self.diagonal[..., tokens - diagonal.shape[-1] : tokens] = diagonal
        self.received[..., : received.shape[-1]] += received

    breaking.setattr(Sums, "add", from_the_first_column)
    error, _ = generation_error(tiny_model("mistral"), [token_ids(1, 20)[0]], do_sample=False)
    assert error > 0.01


def test_control_other_summary_differs() -> None:
    ids = token_ids(1, 30)
    summary = captured_forward(tiny_model("llama"), ids)[0]
    other = AttentionSummary(summary.diagonal, summary.received, layers=(0, 1, 3))
    assert difference(summary, other) == float("inf")
