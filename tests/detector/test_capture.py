"""What is captured of one forward, padded or not, equals the model's own attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lapwing_detector import native
from lapwing_detector.attention import attend
from lapwing_detector.capture import capture_attention
from lapwing_detector.features import laplacian_diagonal, laplacian_eigenvalues
from tests.detector.captures import SAME_MAP, any_model, largest_tensor, padding_error, rounding_error
from tests.detector.tiny_models import (
    FAMILIES,
    WINDOW,
    captured_forward,
    difference,
    eager_forward,
    new_model,
    tiny_model,
    token_ids,
)

pytestmark = pytest.mark.usefixtures("small_blocks")

model = any_model

SAME_LOGITS = 1e-4

LENGTHS = (1, 2, 3, 7, 8, WINDOW - 1, WINDOW, WINDOW + 1, 131, 132, 300)


# One forward.


@pytest.mark.parametrize(
    ("length", "by"), [(length, "in C") for length in LENGTHS] + [(length, "by torch") for length in (WINDOW + 1, 300)]
)
def test_summary_equals_eager_attention(
    model: PreTrainedModel, length: int, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "by torch":
        monkeypatch.setattr(native, "available", lambda: False)
    ids = token_ids(1, length, seed=length)
    assert difference(captured_forward(model, ids)[0], eager_forward(model, ids)) < SAME_MAP


@pytest.mark.parametrize("family", ["gpt_oss", "lfm2"])
def test_sinks_and_hybrids_equal_eager_attention(family: str) -> None:
    ids = token_ids(1, 100)
    summary = captured_forward(tiny_model(family), ids)[0]
    # Experts are chosen by a router that amplifies rounding.
    assert difference(summary, eager_forward(tiny_model(family), ids)) < 5e-5
    if family == "lfm2":
        assert summary.layers == (1,)  # layers without attention are absent, never zero
    else:
        assert summary.received.sum(axis=-1).max() < 100  # the sinks took their share
        assert summary.diagonal[..., 0].max() < 1


def test_logits_equal_those_without_capture(model: PreTrainedModel) -> None:
    for length in (5, 131, 300):
        ids = token_ids(2, length)
        with torch.no_grad():
            plain = model(ids).logits  # SDPA; Gemma 2 refuses it and is eager
            with capture_attention(model):
                captured = model(ids).logits
        torch.testing.assert_close(captured, plain, rtol=0, atol=SAME_LOGITS)


def test_gradients_equal_those_without_capture() -> None:
    model = new_model("llama")
    ids = token_ids(1, 40)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    plain = gradient()
    with capture_attention(model) as captured:
        torch.testing.assert_close(gradient(), plain, rtol=1e-3, atol=1e-4)
    assert captured.summaries()[0].token_count == 40


def test_bfloat16_is_summed_in_float32() -> None:
    model = new_model("llama").to(torch.bfloat16)
    summary = captured_forward(model, token_ids(1, 300))[0]
    # A sum of 300 in bfloat16 would be off by 1.
    np.testing.assert_allclose(summary.received.sum(axis=-1), 300, rtol=1e-5)


def test_attending_in_bfloat16_rounds_the_inputs_only() -> None:
    assert rounding_error() < SAME_MAP


def test_the_map_never_exists() -> None:
    assert largest_tensor(600) < 600 * 600 / 10


def test_autocast_does_not_reach_the_sums() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (summary,) = captured_forward(tiny_model("llama"), token_ids(1, 300))
    np.testing.assert_allclose(summary.received.sum(axis=-1), 300, rtol=1e-5)


def test_without_a_cache_the_summary_is_the_same() -> None:
    for family in ("llama", "mistral"):
        ids = token_ids(1, 60)
        with_cache = captured_forward(tiny_model(family), ids)[0]
        assert difference(captured_forward(tiny_model(family), ids, use_cache=False)[0], with_cache) == 0


def test_the_newest_forward_is_spoken_of() -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured, torch.no_grad():
        model(token_ids(3, 20))
        model(token_ids(1, 9, seed=1))
    (summary,) = captured.summaries()
    assert difference(summary, captured_forward(model, token_ids(1, 9, seed=1))[0]) == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 90), st.integers(0, 2**31), st.sampled_from(list(FAMILIES)))
def test_received_sums_to_the_number_of_tokens(length: int, seed: int, family: str) -> None:
    (summary,) = captured_forward(tiny_model(family), token_ids(1, length, seed=seed))
    np.testing.assert_allclose(summary.received.sum(axis=-1), length, rtol=1e-5)
    assert (summary.received >= -1e-6).all()
    np.testing.assert_allclose(summary.diagonal[..., 0], 1, rtol=1e-6)


def test_eigenvalues_equal_those_of_the_dense_laplacian(model: PreTrainedModel) -> None:
    length = 24
    ids = token_ids(1, length)
    (summary,) = captured_forward(model, ids)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(ids, output_attentions=True).attentions)[:, 0].double().numpy()
    model.set_attn_implementation(before)
    seen = np.arange(length, 0, -1)  # (tokens,): T - i
    for layer in range(maps.shape[0]):
        for head in range(maps.shape[1]):
            a = maps[layer, head]
            dense = np.sort(np.linalg.eigvals(np.diag(a.sum(axis=0) / seen) - a).real)[::-1]
            np.testing.assert_allclose(laplacian_eigenvalues(summary, length)[layer, head], dense, atol=1e-5)
    assert np.abs(laplacian_diagonal(summary)[..., -1]).max() < 1e-6  # the last token is seen by its own row only


# Padding.


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_alone(model: PreTrainedModel, side: str) -> None:
    assert padding_error(model, side) < SAME_MAP


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_with_a_mask_of_the_users_own(side: str) -> None:
    assert padding_error(tiny_model("llama"), side, whole_mask=True) < SAME_MAP


def test_a_head_that_may_not_see_its_own_token() -> None:
    mask = torch.ones(1, 4, 9, 9, dtype=torch.bool).tril()
    mask[0, 2].diagonal()[1:] = False
    (summary,) = captured_forward(tiny_model("llama"), token_ids(1, 9), attention_mask=mask)
    assert summary.token_count == 9
    assert summary.diagonal[:, 2, 1:].max() == 0
    np.testing.assert_allclose(summary.received.sum(axis=-1), 9, rtol=1e-5)


def test_rows_that_see_nothing_spread_no_nan() -> None:
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].clone()
    mask[..., :2, :] = mask[..., :2] = False  # two rows of left padding
    counted = torch.tensor([[False, False, True, True, True, True]])
    output, diagonal, received = attend(query, key, value, mask=mask, first=0, counted=counted, scaling=0.5)
    assert all(bool(part.isfinite().all()) for part in (output, diagonal, received))
    assert received[..., :2].abs().max() == 0
    np.testing.assert_allclose(received.sum(-1), 4, rtol=1e-6)
