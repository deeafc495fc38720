"""A capture of few heads gives the same numbers for these, and none for the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lapwing_detector import reading
from lapwing_detector.capture import capture_attention
from lapwing_detector.errors import InvalidInput
from lapwing_detector.layers import attention_layers
from lapwing_detector.sequences import Sequences
from lapwing_detector.summary import AttentionSummary
from tests.detector.captures import SAME_MAP, STEP_BY_STEP, generated
from tests.detector.tiny_models import FAMILIES, captured_forward, new_model, tiny_model, token_ids

KEPT = {0: [3, 1], 2: [0]}


def require_same(few: AttentionSummary, all_heads: AttentionSummary, tolerance: float) -> None:
    assert few.layers == (0, 2)
    for name in ("diagonal", "received"):
        part, whole = getattr(few, name), getattr(all_heads, name)
        for row, layer in enumerate(few.layers):
            kept = sorted(KEPT[layer])
            np.testing.assert_allclose(part[row, kept], whole[layer, kept], rtol=tolerance, atol=tolerance)
            others = [head for head in range(part.shape[1]) if head not in kept]
            assert np.isnan(part[row, others]).all()  # never zero for what was not looked at


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_kept_heads_are_those_of_the_whole_capture(family: str) -> None:
    model, ids = tiny_model(family), token_ids(1, 70)
    with capture_attention(model, heads=KEPT) as captured, torch.no_grad():
        logits = model(ids).logits
    # Layer 1 runs by SDPA here and by the capture there, which round differently.
    require_same(captured.summaries()[0], captured_forward(model, ids)[0], 5 * SAME_MAP)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_kept_heads_while_generating(family: str) -> None:
    prompts = [token_ids(1, n, seed=n)[0] for n in (12, 3, 30)]
    _, result, mask = generated(tiny_model(family), prompts)
    with capture_attention(tiny_model(family), heads=KEPT) as captured:
        again = tiny_model(family).generate(result[:, :30], attention_mask=mask, max_new_tokens=40)
    whole, _, _ = generated(tiny_model(family), prompts)
    assert torch.equal(result, again)
    for few, all_heads in zip(captured.summaries(), whole.summaries(), strict=True):
        require_same(few, all_heads, STEP_BY_STEP)


def test_layers_that_are_not_kept_are_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = reading.attend
    monkeypatch.setattr(reading, "attend", lambda *args, **rest: calls.append(1) or real(*args, **rest))
    for heads, expected in ((KEPT, 2), (None, 3)):
        calls.clear()
        with capture_attention(tiny_model("llama"), heads=heads), torch.no_grad():
            tiny_model("llama")(token_ids(1, 9))
        assert len(calls) == expected


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ({7: [0]}, r"layer 7; the layers with attention are \[0, 1, 2\]"),
        ({0: [-1]}, "head -1 of layer 0"),
        ({0: []}, "names no head"),
        ({}, "names no head"),
        ([0, 1], r"is \[0, 1\]; give a mapping of layers to their heads"),
        ({0: 3}, "holds 0: 3; give a mapping"),
        ({"0": [3]}, r"holds '0': \[3\]; give a mapping"),
        ({0: [1.5]}, r"holds 0: \[1.5\]; give a mapping"),
        ({0: np.array(3)}, r"holds 0: array\(3\); give a mapping"),
        ({0: "1"}, "holds 0: '1'; give a mapping"),
    ],
)
def test_heads_that_cannot_be_kept(heads: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        capture_attention(tiny_model("llama"), heads=heads)


def test_heads_are_whole_numbers_of_any_kind() -> None:
    ids = token_ids(1, 9)
    with capture_attention(tiny_model("llama"), heads={np.int64(2): np.array([0, 3])}) as captured, torch.no_grad():
        tiny_model("llama")(ids)
    [summary], [whole] = captured.summaries(), captured_forward(tiny_model("llama"), ids)
    np.testing.assert_allclose(summary.received[0, [0, 3]], whole.received[2, [0, 3]], rtol=5 * SAME_MAP)


def test_a_model_may_be_moved_between_two_uses_of_a_capture() -> None:
    layer = attention_layers(tiny_model("llama"))[0]
    sequences, reader, query = Sequences((layer,), {0: (1, 3)}), reading.Reader(), torch.zeros(1, 4, 1, 8)
    for device in ("cpu", "meta", "cpu"):
        heads = reader._heads(sequences, layer, query.to(device))
        assert heads is not None
        assert heads.device.type == device
        assert heads.shape == (2,)


def test_a_head_that_the_layer_lacks() -> None:
    model = new_model("llama")
    with capture_attention(model, heads={1: [0, 4]}), pytest.raises(InvalidInput, match="head 4 of layer 1, which has"):
        model(token_ids(1, 5))
