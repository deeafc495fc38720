"""What a capture gives out in pieces: together it is the summary, however it is cut and whenever it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from lapwing_detector.capture import Captured, capture_attention
from lapwing_detector.chunks import AttentionChunk, AttentionChunks, increment
from lapwing_detector.errors import CaptureError, InvalidInput
from lapwing_detector.summary import AttentionSummary
from tests.detector.tiny_models import OTHERS, tiny_model, token_ids

HALF_ULP = 2**-24
"""Of a float32, relatively."""


class Assembled:
    """Chunks put together as a server does it."""

    def __init__(self) -> None:
        self.diagonal = np.empty((0, 0, 0), np.float32)
        self.received = np.empty((0, 0, 0), np.float64)

    def add(self, chunks: AttentionChunks) -> None:
        shape = (len(chunks.layers), chunks.heads, chunks.tokens)
        diagonal, received = np.full(shape, np.inf, np.float32), np.full(shape, np.inf)
        before = self.diagonal.shape[2]
        assert chunks.first_token == before
        for chunk in chunks:
            layers = slice(chunk.first_layer, chunk.first_layer + chunk.diagonal.shape[0])
            heads = slice(chunk.first_head, chunk.first_head + chunk.diagonal.shape[1])
            assert np.isinf(received[layers, heads]).all(), "no head comes twice"
            assert chunk.first_token == before
            diagonal[layers, heads, before:], received[layers, heads] = chunk.diagonal, chunk.received
        if before:
            diagonal[:, :, :before] = self.diagonal
            received[:, :, :before] += self.received
        self.diagonal, self.received = diagonal, received

    def require_like(self, summary: AttentionSummary) -> None:
        """The sums differ by the roundings of increments only, whose number does not matter."""
        assert not np.isinf(self.received).any(), "every head came"
        np.testing.assert_array_equal(self.diagonal, summary.diagonal)
        np.testing.assert_allclose(self.received, summary.received, rtol=1.01 * HALF_ULP)


def generated(model: Any, prompt: torch.Tensor, **options: Any) -> Captured:
    with capture_attention(model) as captured, torch.no_grad():
        model.generate(prompt, **{"max_new_tokens": 9, "eos_token_id": None, "do_sample": False} | options)
    return captured


@pytest.mark.parametrize("max_bytes", [144, 400, 1000, 2**20])
def test_chunks_of_a_generation_are_its_summary(max_bytes: int) -> None:
    model = tiny_model("llama")
    captured = generated(model, token_ids(1, 9))
    chunks, assembled = captured.chunks(max_bytes), Assembled()
    assembled.add(chunks)
    assembled.require_like(captured.summaries()[0])
    assert assembled.diagonal.shape[2] == chunks.tokens == 18, "the newest token has its row"
    assert all(chunk.diagonal.nbytes + chunk.received.nbytes <= max_bytes for chunk in chunks)
    assert len(chunks) == len(list(chunks)) == {144: 12, 400: 6, 1000: 3, 2**20: 1}[max_bytes]


class After(StoppingCriteria):
    """Calls back after every token, and never stops."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.call()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_rows_are_given_out_while_the_model_generates() -> None:
    model, assembled, seen = tiny_model("llama"), Assembled(), []

    def take() -> None:
        chunks = captured.chunks(final=False)
        assembled.add(chunks)
        seen.append(chunks.tokens)

    with capture_attention(model) as captured, torch.no_grad():
        model.generate(
            token_ids(1, 9), max_new_tokens=9, eos_token_id=None, stopping_criteria=StoppingCriteriaList([After(take)])
        )
    assert seen == list(range(9, 18)), "a token has its row when it was fed"
    assembled.add(captured.chunks())
    assembled.require_like(captured.summaries()[0])
    assert assembled.diagonal.shape[2] == 18


def test_hundreds_of_increments_are_as_exact_as_one() -> None:
    model, assembled, cache = tiny_model("llama"), Assembled(), None
    with capture_attention(model) as captured, torch.no_grad():
        for step in range(300):
            cache = model(token_ids(1, 1, seed=step), past_key_values=cache, use_cache=True).past_key_values
            chunks = captured.chunks()
            assembled.add(chunks)
            assert (chunks.received >= 0).all(), "sums only grow"
    assembled.require_like(captured.summaries()[0])


def test_what_was_given_out_is_not_given_out_again_unless_asked_for() -> None:
    model = tiny_model("llama")
    captured = generated(model, token_ids(1, 9))
    whole = captured.chunks()
    again = captured.chunks()
    assert (list(again), len(again), again.first_token, again.tokens) == ([], 0, 18, 18)
    anew = captured.chunks(from_start=True)
    assert (anew.first_token, anew.tokens) == (0, 18)
    np.testing.assert_array_equal(anew.received, whole.received)
    assert list(captured.chunks()) == []


def test_chunks_stay_as_they_were_while_the_model_goes_on() -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured, torch.no_grad():
        cache = model(token_ids(1, 9), use_cache=True).past_key_values
        chunks = captured.chunks()
        before = [chunk.received.copy() for chunk in chunks]
        model(token_ids(1, 3), past_key_values=cache, use_cache=True)
        after = [chunk.received for chunk in chunks]
    np.testing.assert_array_equal(before, after)
    assert chunks.tokens == 9


def test_a_new_sequence_begins_anew() -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured, torch.no_grad():
        for tokens in (9, 5):
            model(token_ids(1, tokens))
            chunks = captured.chunks()
            assert (chunks.first_token, chunks.tokens) == (0, tokens)


def test_of_a_batch_one_sequence_is_named_and_padding_is_left_out() -> None:
    model, lengths = tiny_model("llama"), (5, 9)
    ids = torch.cat([torch.cat([torch.zeros(1, 9 - n, dtype=torch.long), token_ids(1, n, seed=n)], 1) for n in lengths])
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in lengths])
    captured = generated(model, ids, attention_mask=mask)
    with pytest.raises(InvalidInput, match=r"sequence: is not given, and the batch has 2; give one of 0 to 1"):
        captured.chunks()
    with pytest.raises(InvalidInput, match="sequence: is 2"):
        captured.chunks(sequence=2)
    for sequence, summary in enumerate(captured.summaries()):
        assembled = Assembled()
        assembled.add(captured.chunks(sequence=sequence))
        assembled.require_like(summary)
        assert summary.token_count == lengths[sequence] + 9
        assert list(captured.chunks(sequence=sequence)) == [], "each has its own place"


def test_heads_that_are_not_kept_are_nan_and_other_layers_absent() -> None:
    model = tiny_model("llama")
    with capture_attention(model, heads={0: [1], 2: [0, 3]}) as captured, torch.no_grad():
        model(token_ids(1, 9))
        [chunk] = captured.chunks()
        kept = ~np.isnan(chunk.received).any(axis=2)
        cache_free = captured.chunks()
    assert (captured.chunks(from_start=True).layers, cache_free.heads) == ((0, 2), 4)
    np.testing.assert_array_equal(kept, [[False, True, False, False], [True, False, False, True]])
    np.testing.assert_array_equal(~np.isnan(chunk.diagonal).any(axis=2), kept)


def test_a_model_with_sinks_says_so() -> None:
    assert "gpt_oss" in OTHERS
    for family, sinks in (("gpt_oss", True), ("llama", False)):
        model = tiny_model(family)
        with capture_attention(model) as captured, torch.no_grad():
            model(token_ids(1, 9))
            chunks = captured.chunks()
        assert chunks.attention_sinks is sinks
        rows = chunks.received.sum(axis=2)
        assert bool((rows < 9 - 1e-2).any()) is sinks, "control: rows do add up to less"


def test_without_anything_captured_there_are_no_chunks() -> None:
    captured = capture_attention(tiny_model("llama"))
    with pytest.raises(CaptureError, match="nothing was captured"):
        captured.chunks()


def test_one_head_that_is_larger_than_allowed_is_refused_and_not_lost() -> None:
    captured = generated(tiny_model("llama"), token_ids(1, 9))
    with pytest.raises(InvalidInput, match="max_bytes: is 100; one head of 18 tokens takes 144, give at least that"):
        captured.chunks(100)
    assert captured.chunks().first_token == 0


def test_increments_are_rounded_once() -> None:
    generator = np.random.default_rng(0)
    before = generator.uniform(0, 5000, (1, 1, 1000)).astype(np.float32)
    rows = generator.uniform(0, 1, (1, 1, 1010)).astype(np.float32)
    now = rows.copy()
    now[:, :, :1000] += before
    summary = AttentionSummary(np.zeros_like(now), now, (0,))
    found = increment(summary, before)
    exact = now.astype(np.float64)
    exact[:, :, :1000] -= before
    np.testing.assert_allclose(found, exact, rtol=HALF_ULP, atol=0)
    assert (found >= 0).all()


def test_pieces_are_plain_values() -> None:
    [chunk] = generated(tiny_model("llama"), token_ids(1, 9)).chunks()
    assert isinstance(chunk, AttentionChunk)
    for array in (chunk.diagonal, chunk.received):
        assert memoryview(array).format == "f"
        assert memoryview(array).c_contiguous
    with pytest.raises(AttributeError):
        chunk.first_token = 3  # type: ignore[misc]
