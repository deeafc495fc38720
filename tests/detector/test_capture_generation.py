"""What is captured of a generation, step by step and with any cache, equals one forward over the same ids."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, StaticCache

from lapwing_detector.capture import capture_attention
from tests.detector.captures import (
    ENDS,
    OTHER_ENDS,
    STEP_BY_STEP,
    EndsAt,
    any_model,
    content,
    error_with_a_new_cache,
    generated,
    generation_error,
    other_ends_error,
)
from tests.detector.tiny_models import (
    EOS,
    LONG,
    PAD,
    captured_forward,
    difference,
    long_model,
    new_model,
    tiny_model,
    token_ids,
)

pytestmark = pytest.mark.usefixtures("small_blocks")

model = any_model

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


@pytest.mark.parametrize("ends", OTHER_ENDS)
def test_rows_ended_by_other_criteria(ends: str) -> None:
    assert other_ends_error(ends) < STEP_BY_STEP


def test_without_stop_tokens_no_row_is_padded() -> None:
    model = tiny_model("llama")  # `generate` then goes on with all rows until all have ended
    options = {"eos_token_id": None, "stopping_criteria": [EndsAt(ENDS)], "do_sample": True}
    captured, result, _ = generated(model, [token_ids(1, 9, seed=n)[0] for n in range(3)], **options)
    for row, summary in zip(result, captured.summaries(), strict=True):
        assert difference(summary, captured_forward(model, row[None])[0]) < STEP_BY_STEP


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
