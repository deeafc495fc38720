"""What is captured equals the model's own attention, however the model is run; and each control breaks it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast, StaticCache, StoppingCriteria

from lapwing_detector import attention, capture, forward, generation_run
from lapwing_detector.attention import attend
from lapwing_detector.capture import Captured, capture_attention
from lapwing_detector.features import laplacian_diagonal, laplacian_eigenvalues
from lapwing_detector.layers import AttentionLayer
from lapwing_detector.summary import AttentionSummary
from tests.detector.tiny_models import (
    EOS,
    FAMILIES,
    LONG,
    PAD,
    WINDOW,
    captured_forward,
    difference,
    eager_forward,
    long_model,
    new_model,
    tiny_model,
    token_ids,
)

pytestmark = pytest.mark.usefixtures("small_blocks")

SAME_MAP = 1e-5
"""Float32: eager attention itself is up to 1.6e-5 from the same model in float64 at 300 tokens, mostly below 1e-5."""

SAME_LOGITS = 1e-4
STEP_BY_STEP = 1e-4
"""Projections of one row and of many are summed in another order, and the layers amplify it."""

LENGTHS = (1, 2, 3, 7, 8, WINDOW - 1, WINDOW, WINDOW + 1, 131, 132, 300)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


# One forward.


@pytest.mark.parametrize("length", LENGTHS)
def test_summary_equals_eager_attention(model: PreTrainedModel, length: int) -> None:
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


def rounding_error() -> float:
    """Of attending in bfloat16, against the same numbers in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 300, 8, generator=generator).bfloat16() for _ in range(3)]
    counted = torch.ones(1, 300, dtype=torch.bool)
    _, *rough = attend(*inputs, mask=None, first=0, counted=counted, scaling=0.5)
    _, *exact = attend(*(one.double() for one in inputs), mask=None, first=0, counted=counted, scaling=0.5)
    return max(float((one - other).abs().max()) for one, other in zip(rough, exact, strict=True))


def test_attending_in_bfloat16_rounds_the_inputs_only() -> None:
    assert rounding_error() < SAME_MAP


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return made


def largest_tensor(tokens: int) -> int:
    query, key, value = (torch.randn(1, 2, tokens, 4) for _ in range(3))
    counted = torch.ones(1, tokens, dtype=torch.bool)
    with LargestTensor() as largest:
        attend(query, key, value, mask=None, first=0, counted=counted, scaling=0.5)
    return largest.elements


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


def padding_error(model: PreTrainedModel, side: str, whole_mask: bool = False) -> float:
    """With `whole_mask` the mask is given as (batch, 1, rows, columns) bool."""
    lengths = (40, 23, 1, 131)
    ids, mask = padded([token_ids(1, n, seed=n)[0] for n in lengths], side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if whole_mask:
        mask = mask.bool()[:, None, None, :] & torch.ones(131, 131, dtype=torch.bool).tril()
    together = captured_forward(model, ids, attention_mask=mask, position_ids=positions)
    alone = [captured_forward(model, token_ids(1, n, seed=n))[0] for n in lengths]
    assert [summary.diagonal.dtype for summary in together] == [np.float32] * 4
    return max(difference(one, other) for one, other in zip(together, alone, strict=True))


def padded(sequences: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PAD, padding_side=side)
    ones = [torch.ones_like(sequence) for sequence in sequences]
    return ids, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


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


# Generation.


def generated(
    model: PreTrainedModel, prompts: list[torch.Tensor], **options: object
) -> tuple[Captured, torch.Tensor, torch.Tensor]:
    """The capture, the sequences and the prompts' mask."""
    ids, mask = padded(prompts, "left")
    torch.manual_seed(3)
    with capture_attention(model) as captured:
        result = model.generate(ids, attention_mask=mask, max_new_tokens=40, **options)
    return captured, result, mask


def content(row: torch.Tensor, mask: torch.Tensor, eos: tuple[int, ...] = EOS) -> torch.Tensor:
    """A generated row without padding, up to and without the end-of-sequence token behind the prompt."""
    prompt, answer = row[: len(mask)][mask.bool()], row[len(mask) :]
    ends = torch.isin(answer, torch.tensor(eos)).nonzero()
    return torch.cat([prompt, answer[: int(ends[0])] if len(ends) else answer])


def generation_error(model: PreTrainedModel, prompts: list[torch.Tensor], **options: object) -> tuple[float, set[int]]:
    """Largest difference to one forward over the same ids, and the lengths of the answers."""
    captured, result, mask = generated(model, prompts, **options)
    kept = [content(row, row_mask) for row, row_mask in zip(result, mask, strict=True)]
    alone = [captured_forward(model, ids[None])[0] for ids in kept]
    worst = max(difference(one, other) for one, other in zip(captured.summaries(), alone, strict=True))
    return worst, {len(ids) - int(row_mask.sum()) for ids, row_mask in zip(kept, mask, strict=True)}


CACHES = [{}, {"cache_implementation": "static"}]


@pytest.mark.parametrize("cache", CACHES, ids=["dynamic", "static"])
def test_generating_equals_one_forward(model: PreTrainedModel, cache: dict[str, str]) -> None:
    prompts = [token_ids(1, n, seed=n)[0] for n in (12, 3, 30, 20)]
    prompts[1][0] = EOS[0]  # an end-of-sequence token inside a prompt is content
    error, lengths = generation_error(model, prompts, do_sample=True, **cache)
    assert len(lengths) > 1  # the rows ended at different steps
    assert error < STEP_BY_STEP
    error, _ = generation_error(model, prompts[:1], do_sample=False, **cache)
    assert error < STEP_BY_STEP


@pytest.mark.parametrize("family", ["gpt_oss", "lfm2"])
def test_generating_with_sinks_and_hybrids_equals_one_forward(family: str) -> None:
    prompts = [token_ids(1, 12)[0], token_ids(1, 12, seed=1)[0]]
    error, _ = generation_error(tiny_model(family), prompts, do_sample=True)
    assert error < STEP_BY_STEP


class EndsAt(StoppingCriteria):
    """Ends a sequence of a batch at certain tokens, which are no end-of-sequence tokens."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


ENDS = tuple(range(12, 18))
SAMPLED_PAD = 86
"""A pad token that the model samples as any other."""


def letters() -> PreTrainedTokenizerFast:
    """Token i is the character of code i + 30."""
    vocabulary = {chr(i + 30) if i > 2 else f"<{i}>": i for i in range(97)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


OTHER_ENDS = {
    "criteria": lambda: {"stopping_criteria": [EndsAt(ENDS)]},
    "strings": lambda: {"stop_strings": [chr(token + 30) for token in ENDS], "tokenizer": letters()},
}


def other_ends_error(ends: str) -> float:
    model, prompts = tiny_model("llama"), [token_ids(1, 9, seed=n)[0] for n in range(4)]
    options = {"eos_token_id": 2, "pad_token_id": SAMPLED_PAD, "do_sample": True, **OTHER_ENDS[ends]()}
    captured, result, _ = generated(model, prompts, **options)
    kept = []
    for row in result:
        last = next((at for at in range(9, len(row)) if int(row[at]) in (2, *ENDS)), len(row) - 1)
        # The token that other criteria end a sequence at is content, an end-of-sequence token is not.
        kept.append(row[: last + int(row[last] != 2)])
    assert len({len(ids) for ids in kept}) > 1
    assert any(SAMPLED_PAD in ids[9:] for ids in kept)
    alone = [captured_forward(model, ids[None])[0] for ids in kept]
    return max(difference(one, other) for one, other in zip(captured.summaries(), alone, strict=True))


@pytest.mark.parametrize("ends", OTHER_ENDS)
def test_rows_ended_by_other_criteria(ends: str) -> None:
    assert other_ends_error(ends) < STEP_BY_STEP


def test_without_stop_tokens_no_row_is_padded() -> None:
    model = tiny_model("llama")  # `generate` then goes on with all rows until all have ended
    options = {"eos_token_id": None, "stopping_criteria": [EndsAt(ENDS)], "do_sample": True}
    captured, result, _ = generated(model, [token_ids(1, 9, seed=n)[0] for n in range(3)], **options)
    for row, summary in zip(result, captured.summaries(), strict=True):
        assert difference(summary, captured_forward(model, row[None])[0]) < STEP_BY_STEP


def error_with_a_new_cache() -> float:
    model = long_model("longrope")  # it drops its cache at LONG tokens, and all goes through one forward
    prompts = [token_ids(1, 9, seed=n)[0] for n in range(5)]
    captured, result, mask = generated(model, prompts, do_sample=True, eos_token_id=[2, 3])
    lengths = [len(content(row, row_mask, eos=(2, 3))) for row, row_mask in zip(result, mask, strict=True)]
    assert min(lengths) < LONG < max(lengths)
    visible = (torch.arange(result.shape[1]) < torch.tensor(lengths)[:, None]).long()
    together = captured_forward(model, result, attention_mask=visible)
    return max(difference(one, other) for one, other in zip(captured.summaries(), together, strict=True))


def test_rows_keep_their_ends_when_the_cache_is_made_anew() -> None:
    assert error_with_a_new_cache() < STEP_BY_STEP


def test_a_single_new_token() -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured:
        result = model.generate(token_ids(1, 9), max_new_tokens=1, eos_token_id=None)
    assert difference(captured.summaries()[0], captured_forward(model, result)[0]) < STEP_BY_STEP


@pytest.mark.parametrize("cache", CACHES, ids=["dynamic", "static"])
def test_the_newest_token_gets_its_row(cache: dict[str, str]) -> None:
    model = tiny_model("mistral")
    prompts = [token_ids(1, 25)[0], token_ids(1, 12)[0]]
    captured, result, mask = generated(model, prompts, eos_token_id=None, pad_token_id=PAD, **cache)
    assert captured._sequences.tokens == result.shape[1] - 1
    captured.complete()
    assert captured._sequences.tokens == result.shape[1]
    first = captured.summaries()
    captured.complete()  # a second time changes nothing
    assert [difference(a, b) for a, b in zip(first, captured.summaries(), strict=True)] == [0, 0]
    for row, row_mask, summary in zip(result, mask, first, strict=True):
        ids = content(row, row_mask, eos=())
        assert difference(summary, captured_forward(model, ids[None])[0]) < STEP_BY_STEP


def test_complete_runs_inside_the_context_too() -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured:
        result = model.generate(token_ids(1, 9), max_new_tokens=5, eos_token_id=None)
        (summary,) = captured.summaries()
        assert summary.token_count == result.shape[1] == 14


def test_an_ended_generation_needs_no_further_step() -> None:
    model = new_model("llama")
    answer = model.generate(token_ids(1, 9), max_new_tokens=6, eos_token_id=None)[0, 9:].tolist()
    with capture_attention(model) as captured:
        result = model.generate(token_ids(1, 9), max_new_tokens=6, eos_token_id=answer[-1])
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    (summary,) = captured.summaries()
    assert not forwards
    assert summary.token_count == result.shape[1] - 1


def test_prompt_fed_in_chunks(model: PreTrainedModel) -> None:
    prompts = [token_ids(1, n, seed=n)[0] for n in (37, 21)]  # the last chunk is a single token
    prompts[0][[8, 17, 36]] = EOS[0]  # the last tokens of chunks, and they end nothing
    error, _ = generation_error(model, prompts, do_sample=True, prefill_chunk_size=9)
    assert error < STEP_BY_STEP


def test_several_answers_to_one_prompt() -> None:
    model = tiny_model("llama")
    with capture_attention(model) as captured:
        torch.manual_seed(1)
        result = model.generate(token_ids(1, 9), max_new_tokens=30, do_sample=True, num_return_sequences=3)
    for row, summary in zip(result, captured.summaries(), strict=True):
        ids = content(row, torch.ones(9))
        assert difference(summary, captured_forward(model, ids[None])[0]) < STEP_BY_STEP


def test_a_conversation_that_goes_on_with_its_cache() -> None:
    model = tiny_model("mistral")
    with capture_attention(model) as captured:
        first = model.generate(
            token_ids(1, 9), max_new_tokens=20, do_sample=True, eos_token_id=None, return_dict_in_generate=True
        )
        captured.complete()
        ids = torch.cat([first.sequences, token_ids(1, 7, seed=1)], dim=1)
        result = model.generate(ids, past_key_values=first.past_key_values, max_new_tokens=9, eos_token_id=None)
    assert difference(captured.summaries()[0], captured_forward(model, result)[0]) < STEP_BY_STEP


def test_a_conversation_that_goes_on_behind_a_stop_token() -> None:
    model = new_model("llama")
    answer = model.generate(token_ids(1, 9), max_new_tokens=6, eos_token_id=None)[0, 9:].tolist()
    with capture_attention(model) as captured:
        first = model.generate(
            token_ids(1, 9), max_new_tokens=20, eos_token_id=answer[-1], return_dict_in_generate=True
        )
        assert captured.summaries()[0].token_count == first.sequences.shape[1] - 1
        ids = torch.cat([first.sequences, token_ids(1, 7, seed=1)], dim=1)
        result = model.generate(ids, past_key_values=first.past_key_values, max_new_tokens=9, eos_token_id=None)
    assert difference(captured.summaries()[0], captured_forward(model, result)[0]) < STEP_BY_STEP


def test_a_long_text_goes_on_with_the_frequencies_of_long_ones() -> None:
    model, ids = long_model("longrope"), token_ids(1, LONG + 9)
    with capture_attention(model) as captured, torch.no_grad():
        cache = model(ids[:, : LONG + 1]).past_key_values
        for at in range(LONG + 1, LONG + 9):
            model(ids[:, at : at + 1], past_key_values=cache)
    assert difference(captured.summaries()[0], captured_forward(model, ids)[0]) < STEP_BY_STEP


@pytest.mark.parametrize("inference", [False, True])
def test_a_loop_of_forwards_step_by_step(model: PreTrainedModel, inference: bool) -> None:
    ids = token_ids(2, 45)
    captured = capture_attention(model)
    cache = None
    for start, stop in [(0, 20), (20, 21), (21, 30), *((at, at + 1) for at in range(30, 45))]:
        # Mode changes in the middle: the sums must take both.
        with captured.resume(), torch.inference_mode(inference and start < 30), torch.no_grad():
            cache = model(ids[:, start:stop], past_key_values=cache, use_cache=True).past_key_values
            if inference and start >= 30:
                assert not captured._sequences.sums[0].diagonal.is_inference()
    for summary, alone in zip(captured.summaries(), captured_forward(model, ids), strict=True):
        assert difference(summary, alone) < STEP_BY_STEP


def test_static_cache_given_by_hand(model: PreTrainedModel) -> None:
    ids = token_ids(2, 45)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with capture_attention(model) as captured, torch.no_grad():
        for start, stop in [(0, 10), (10, 22), *((at, at + 1) for at in range(22, 45))]:
            model(ids[:, start:stop], past_key_values=cache)
    for summary, alone in zip(captured.summaries(), captured_forward(model, ids), strict=True):
        assert difference(summary, alone) < STEP_BY_STEP


def test_several_captures_take_turns_on_one_model() -> None:
    model = tiny_model("llama")
    texts = [token_ids(1, 12, seed=seed) for seed in range(3)]
    captures, caches = [capture_attention(model) for _ in texts], [None] * 3
    for step in range(12):
        for index, (captured, ids) in enumerate(zip(captures, texts, strict=True)):
            with captured.resume(), torch.no_grad():
                output = model(ids[:, step : step + 1], past_key_values=caches[index], use_cache=True)
                caches[index] = output.past_key_values
    for captured, ids in zip(captures, texts, strict=True):
        assert difference(captured.summaries()[0], captured_forward(model, ids)[0]) < STEP_BY_STEP


# Controls: the comparisons above notice when one mechanism is left out of the code that they test.


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


def error_of(family: str, length: int = 60) -> float:
    ids = token_ids(1, length)
    return difference(captured_forward(tiny_model(family), ids)[0], eager_forward(tiny_model(family), ids))


def test_control_not_causal(breaking: pytest.MonkeyPatch) -> None:
    assert error_of("llama") < SAME_MAP
    breaking.setattr(attention, "_hide", lambda scores, mask, first: scores)
    assert error_of("llama") > 0.01


def test_control_mask_function_that_is_not_causal_is_refused(breaking: pytest.MonkeyPatch) -> None:
    everything = torch.ones(1, 1, 60, 60, dtype=torch.bool)
    breaking.setattr("lapwing_detector.switch.sdpa_mask", lambda **_: everything)
    with pytest.raises(capture.CaptureError, match="later"):
        error_of("llama")


def test_control_scale(breaking: pytest.MonkeyPatch) -> None:
    real = attention._scores
    breaking.setattr(attention, "_scores", lambda query, key, scaling, softcap: real(query, key, 1.0, softcap))
    assert error_of("llama") > 0.01
    assert error_of("gpt2") > 0.01


def test_control_scale_of_another_layer(breaking: pytest.MonkeyPatch) -> None:
    real = attention._scores
    breaking.setattr(attention, "_scores", lambda query, key, scaling, softcap: real(query, key, 0.5, softcap))
    assert error_of("gpt2") > 0.01  # it scales by the layer; 0.5 is right for the first one only


def test_control_softcap(breaking: pytest.MonkeyPatch) -> None:
    real = attention._scores
    breaking.setattr(attention, "_scores", lambda query, key, scaling, softcap: real(query, key, scaling, None))
    assert error_of("gemma2") > 0.01


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_control_window(breaking: pytest.MonkeyPatch, family: str) -> None:
    real = attention._hide
    breaking.setattr(attention, "_hide", lambda scores, mask, first: real(scores, None, first))
    assert error_of(family, WINDOW) < SAME_MAP  # within the window nothing is lost
    assert error_of(family, WINDOW + 1) > 1e-3


def test_control_order_of_key_value_heads(breaking: pytest.MonkeyPatch) -> None:
    breaking.setattr(
        capture, "attend", lambda query, key, value, **rest: attend(query, key.flip(1), value.flip(1), **rest)
    )
    assert error_of("llama") > 0.01


@pytest.mark.parametrize("whole_mask", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_control_padding_counted(breaking: pytest.MonkeyPatch, side: str, whole_mask: bool) -> None:
    real = forward.Forward.report

    def all_count(self: forward.Forward, *call: object) -> forward.Place:
        place = real(self, *call)  # type: ignore[arg-type]
        return forward.Place(place.first, place.columns, place.mask, torch.ones_like(place.counted))

    breaking.setattr(forward.Forward, "report", all_count)
    # On the right, padding looks like real rows; on the left it sees nothing, and attends to everything.
    assert padding_error(tiny_model("llama"), side, whole_mask) > 0.01


def test_control_all_keys_of_a_static_cache(breaking: pytest.MonkeyPatch) -> None:
    real = forward.Forward.report

    def uncropped(self: forward.Forward, layer: AttentionLayer, query: Any, key: Any, mask: Any) -> forward.Place:
        place = real(self, layer, query, key, mask)
        return forward.Place(place.first, key.shape[2], mask, place.counted)

    prompts = [token_ids(1, 12)[0]]
    assert generation_error(tiny_model("llama"), prompts, cache_implementation="static")[0] < STEP_BY_STEP
    breaking.setattr(forward.Forward, "report", uncropped)
    assert generation_error(tiny_model("llama"), prompts)[0] < STEP_BY_STEP  # a dynamic cache has no others
    with pytest.raises(RuntimeError):  # the sums have more columns than the text has tokens
        generation_error(tiny_model("llama"), prompts, cache_implementation="static")


def test_control_sums_in_bfloat16(breaking: pytest.MonkeyPatch) -> None:
    breaking.setattr(attention, "_at_least_float32", lambda tensor: tensor.dtype)
    breaking.setattr(torch.Tensor, "float", lambda self: self)
    assert rounding_error() > 1e-3


def test_control_one_block_is_the_map(breaking: pytest.MonkeyPatch) -> None:
    breaking.setattr(attention, "BLOCK_BYTES", 2**40)
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
    from lapwing_detector.sequences import LayerSums

    def from_the_first_column(self: LayerSums, diagonal: torch.Tensor, received: torch.Tensor, tokens: int) -> None:
        self._reserve(tokens)
        self.diagonal[..., tokens - diagonal.shape[-1] : tokens] = diagonal
        self.received[..., : received.shape[-1]] += received

    breaking.setattr(LayerSums, "add", from_the_first_column)
    error, _ = generation_error(tiny_model("mistral"), [token_ids(1, 20)[0]], do_sample=False)
    assert error > 0.01


def test_control_other_summary_differs() -> None:
    ids = token_ids(1, 30)
    summary = captured_forward(tiny_model("llama"), ids)[0]
    other = AttentionSummary(summary.diagonal, summary.received, layers=(0, 1, 3))
    assert difference(summary, other) == float("inf")
