"""What the doctor says of memory and time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lapwing_detector import reading
from lapwing_detector.attention import attend
from lapwing_detector.cache_mark import cache_in
from lapwing_detector.doctor import cost, overhead
from lapwing_detector.doctor.cost import attended_pairs, check_cost, estimated_seconds
from lapwing_detector.doctor.layers import reaches
from lapwing_detector.doctor.memory import Memory, cache_sizes, cached_bytes
from lapwing_detector.doctor.patient import Patient
from lapwing_detector.language_model import LanguageModel
from tests.detector.architectures import build
from tests.detector.captures import letters
from tests.detector.test_doctor import tiny


@pytest.mark.parametrize("family", ["llama", "mistral", "lfm2"])
def test_the_estimated_cache_is_as_large_as_a_real_one(family):
    patient = Patient(tiny(family))
    with torch.inference_mode():
        cache = cache_in(patient.model(patient.tokens(300), use_cache=True))
    real = 0
    for layer in cache.layers:
        states = [one for name in ("conv_states", "recurrent_states") for one in getattr(layer, name, {}).values()]
        held = [
            one for one in [getattr(layer, "keys", None), getattr(layer, "values", None), *states] if one is not None
        ]
        real += sum(one.nbytes for one in held)
    assert cached_bytes(cache_sizes(patient), 300) == real
    assert cached_bytes(cache_sizes(patient), 301) != real or family == "mistral"  # which holds its window only


def test_memory_is_two_float32_a_layer_head_and_token_and_maps_are_the_square():
    numbers = check_cost(Patient(tiny()), measure=False).numbers
    assert [one["sums_bytes"] for one in numbers["lengths"]] == [8 * 3 * 4 * tokens for tokens in (1024, 8192, 32768)]
    assert numbers["lengths"][0]["maps_bytes"] == 4 * 3 * 4 * 1024**2
    assert numbers["lengths"][0]["cache_bytes"] == 2 * 4 * 3 * 2 * 4 * 1024  # of 2 key-value heads 4 wide
    assert [one["beyond_context"] for one in numbers["lengths"]] == [True] * 3  # of 512
    model = tiny().model
    assert numbers["weights_bytes"] == sum(one.nbytes for one in (*model.parameters(), *model.buffers()))


PAIRS = {  # of 3 layers; with a window of 16 a row sees 16 but for the first
    "llama": {512: 393_216, 1024: 1_572_864, 2048: 6_291_456, 32768: 1_610_612_736},
    "mistral": {512: 24_192, 1024: 48_768, 2048: 97_920, 32768: 1_572_480},
    "gemma2": {512: 147_200, 1024: 556_800, 2048: 2_162_432, 32768: 537_919_232},
}


@pytest.mark.parametrize("family", list(PAIRS))
def test_time_is_drawn_out_by_tokens_and_by_the_pairs_that_attend(family):
    seconds = {tokens: 1e-4 * tokens + 1e-8 * pairs for tokens, pairs in PAIRS[family].items()}
    measured = {tokens: seconds[tokens] for tokens in (512, 1024, 2048)}
    assert estimated_seconds(Patient(tiny(family)), measured, 32768) == pytest.approx(seconds[32768])


def test_noise_makes_no_share_of_the_time_negative():
    patient = Patient(tiny())
    assert estimated_seconds(patient, {1024: 1.0, 2048: 1.5}, 8192) == pytest.approx(6.0)  # no pairs, only tokens
    assert estimated_seconds(patient, {1024: 0.1, 2048: 1.6}, 8192) == pytest.approx(25.6)  # no tokens, only pairs
    assert estimated_seconds(patient, {1024: 1.0}, 8192) is None


def test_pairs_of_chunks_grow_like_tokens():
    patient = Patient(LanguageModel(build("llama4_text"), letters()))
    assert attended_pairs(patient, 20) == 3 * (16 * 16 / 2 + 4 * 4 / 2) + 20 * 20 / 2  # the fourth layer sees all
    patient.model.config.layer_types = ["chunked_attention"] * 4
    assert attended_pairs(patient, 1024) == 4 * 64 * 128
    assert estimated_seconds(patient, {1024: 1.0, 2048: 2.0}, 32768) == pytest.approx(32.0)


def test_layers_without_attention_have_no_pairs_and_whole_maps_have_all():
    assert attended_pairs(Patient(tiny("lfm2")), 4096) == 4096**2 / 2  # one of three
    neo = Patient(LanguageModel(build("gpt_neo"), letters()), "eager")  # half of its layers have a window
    assert reaches(neo.model) == {"local": 16}
    assert attended_pairs(neo, 128) == 4 * 128**2 / 2


def test_a_window_makes_far_tokens_cost_nothing():
    sliding, full = Patient(tiny("mistral")), Patient(tiny("llama"))
    assert attended_pairs(full, 4096) == 3 * 4096**2 / 2
    assert attended_pairs(sliding, 8192) - attended_pairs(sliding, 4096) == 3 * 16 * 4096
    assert attended_pairs(sliding, 8) == attended_pairs(full, 8)


@pytest.mark.parametrize(
    ("family", "count"), [("llama", 0), ("mistral", 1), ("gemma2", 1), ("gpt_oss", 1), ("llama4_text", 1)]
)
def test_the_estimated_masks_are_those_that_the_layers_are_given(family, count, monkeypatch):
    given: dict[int, torch.Tensor] = {}

    def seen(*call: Any, mask: torch.Tensor | None, **rest: Any) -> Any:
        if mask is not None:
            given[mask.data_ptr()] = mask  # held, so that no other takes its place
        return attend(*call, mask=mask, **rest)

    monkeypatch.setattr(reading, "attend", seen)
    patient = Patient(tiny(family) if family != "llama4_text" else LanguageModel(build(family), letters()))
    memory = Memory.of(patient)
    for tokens in (8, 80):  # before and behind the edge
        given.clear()
        patient.read([patient.tokens(tokens)[0].tolist()])
        assert sum(one.nbytes for one in given.values()) == memory.at(tokens)["masks_bytes"]
    assert len(given) == count


def test_the_total_is_all_that_is_held():
    numbers = check_cost(Patient(tiny("mistral")), measure=False).numbers
    one = numbers["lengths"][0]
    held = 8 * 3 * 4 * 1024 + 2 * 4 * 3 * 2 * 4 * 15 + 1024**2  # sums, a cache without the newest token, one mask
    assert (one["map_bytes"], one["total_bytes"]) == (0, numbers["weights_bytes"] + held)


def test_the_fallback_holds_one_map_and_its_masks():
    patient = Patient(LanguageModel(build("falcon"), letters()), "eager")
    check = check_cost(patient, measure=False)
    one = check.numbers["lengths"][0]
    assert one["map_bytes"] == 4 * 4 * 1024**2  # of 4 heads
    assert one["masks_bytes"] == (4 + 1) * 1024**2
    assert one["total_bytes"] - check.numbers["weights_bytes"] > one["map_bytes"] + one["masks_bytes"]
    assert "one map with its masks" in check.said


def test_why_no_longer_text_was_measured_is_kept(monkeypatch):
    def reads(patient: Patient, tokens: int, captured: bool) -> None:
        if tokens > 256:
            raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(cost, "read", reads)
    check = check_cost(Patient(tiny()))
    assert list(check.numbers["measured_seconds"]) == [128, 256]
    assert check.numbers["stopped"] == "512 tokens ended in RuntimeError: out of memory"
    assert check.said.endswith("no longer text was measured: 512 tokens ended in RuntimeError: out of memory")
    monkeypatch.setattr(cost, "read", lambda *_, **__: None)
    assert check_cost(Patient(tiny())).numbers["stopped"] == ""


def test_what_an_estimate_rests_on_was_warmed_up(monkeypatch):
    taken = iter([5.0, 1.0, 9.0, 2.0])
    monkeypatch.setattr(cost, "seconds", lambda *_: next(taken))
    assert cost.measured_seconds(Patient(tiny())) == ({128: 1.0, 256: 2.0}, "")  # slow, so no third


def test_the_overhead_is_the_ratio_of_medians_and_the_quartiles_of_pairs():
    told = overhead.ratio(lambda captured: 3.0 if captured else 2.0)
    assert (told["ratio"], told["low"], told["high"]) == (1.5, 1.5, 1.5)
    assert (told["seconds"], told["rival_seconds"]) == (3.0, 2.0)
    assert told["repetitions"] >= overhead.REPETITIONS


@pytest.mark.parametrize(("seconds", "repetitions"), [(0.1, overhead.REPETITIONS), (5.0, 1)])
def test_a_slow_model_is_measured_less_often_and_it_is_said(seconds, repetitions, monkeypatch):
    monkeypatch.setattr(overhead, "SECONDS", -1.0)
    told = overhead.ratio(lambda captured: seconds * (2 if captured else 1))
    assert told["repetitions"] == repetitions
    assert (told["ratio"], told["low"], told["high"]) == (2.0, 2.0, 2.0)
    said = "2.00 x (measured once)" if repetitions == 1 else "2.00 x (2.00 to 2.00 in 5 turns)"
    assert overhead.in_words(told) == said
