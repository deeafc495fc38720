"""A capture by the kernels, in Triton's interpreter, gives what a capture without them gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lapwing_detector import kernels
from lapwing_detector.batch import Batch
from lapwing_detector.capture import capture_attention
from tests.detector.captures import SAME_MAP, STEP_BY_STEP, content, padded
from tests.detector.stream_schedules import language_model, prompt
from tests.detector.test_kept_heads import KEPT, require_same
from tests.detector.test_streams_failures import failing
from tests.detector.tiny_models import captured_forward, difference, eager_forward, tiny_model, token_ids

EXPERTS = 5 * SAME_MAP
"""Experts are chosen by a router that amplifies rounding."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often each of the kernels' entries was called; at least once in every test."""
    counts = {"attend": 0, "attend_row": 0}

    def counted(name: str):  # type: ignore[no-untyped-def]
        real = getattr(kernels, name)

        def call(*args, **rest):  # type: ignore[no-untyped-def]
            counts[name] += 1
            return real(*args, **rest)

        return call

    for name in counts:
        monkeypatch.setattr(kernels, name, counted(name))
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    yield counts
    assert sum(counts.values()) > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_oss"])
def test_one_forward_equals_eager_attention(family: str, calls: dict[str, int]) -> None:
    ids = token_ids(1, 40)
    summary = captured_forward(tiny_model(family), ids)[0]
    assert difference(summary, eager_forward(tiny_model(family), ids)) < EXPERTS
    assert calls["attend"] == len(summary.layers)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(calls: dict[str, int], side: str) -> None:
    texts = [token_ids(1, n, seed=n)[0] for n in (20, 9)]
    ids, mask = padded(texts, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = captured_forward(tiny_model("llama"), ids, attention_mask=mask, position_ids=positions)
    for summary, text in zip(together, texts, strict=True):
        assert difference(summary, eager_forward(tiny_model("llama"), text[None])) < SAME_MAP


def test_rows_of_a_forward_that_failed_are_not_added_again(calls: dict[str, int]) -> None:
    model, prompts = language_model(), [prompt(9).prompt_ids]
    batch, _ = Batch.read(model, None, prompts)
    with failing(model, lambda ids: True) as failures, pytest.raises(MemoryError):
        batch.feed([5])
    assert failures == [1]
    assert calls["attend_row"] == 2  # of three layers
    [again] = batch.apart()
    expected, _ = Batch.read(model, None, prompts)
    for one in (again, expected):
        for token in (5, 7):
            one.feed([token])
    assert difference(again.summary(0), expected.summary(0)) < STEP_BY_STEP
    [twice] = batch.apart()
    twice.sums.close()  # the control: as if nothing of it had been added
    for token in (5, 7):
        twice.feed([token])
    assert difference(twice.summary(0), expected.summary(0)) > 0.01


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generating_adds_rows_in_place(family: str, calls: dict[str, int]) -> None:
    # Up to the window and past it; two rows of padding on the left.
    ids, mask = padded([token_ids(1, n, seed=n)[0] for n in (14, 12)], "left")
    with capture_attention(tiny_model(family)) as captured:
        result = tiny_model(family).generate(ids, attention_mask=mask, max_new_tokens=5, eos_token_id=2)
    for summary, row, row_mask in zip(captured.summaries(), result, mask, strict=True):
        whole = eager_forward(tiny_model(family), content(row, row_mask, eos=(2,))[None])
        assert difference(summary, whole) < STEP_BY_STEP
    assert calls["attend_row"] == 3 * 5


def test_kept_heads(calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("gemma2"), token_ids(1, 30)  # whose layers that are not kept are attended for by us
    with capture_attention(model, heads=KEPT) as captured, torch.no_grad():
        cache = model(ids[:, :29]).past_key_values
        model(ids[:, 29:], past_key_values=cache)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    require_same(captured.summaries()[0], captured_forward(model, ids)[0], STEP_BY_STEP)


def test_gradients_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    monkeypatch.setattr(kernels, "attend", lambda *_, **__: pytest.fail("kernels have no gradients"))
    with capture_attention(tiny_model("llama")) as captured:
        tiny_model("llama")(token_ids(1, 9)).logits.sum().backward()
    assert captured.summaries()[0].token_count == 9
    tiny_model("llama").zero_grad()
