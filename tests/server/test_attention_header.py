"""The first message of a stream of attention: every wrong field is named, and attention of another model refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from attention_fakes import (
    SAMPLE,
    a_bfloat16_header,
    an_assembly,
    outcome_of,
    refusal_of,
)
from engine_fakes import CONTEXT, a_probe, an_identity
from hypothesis import given, settings
from hypothesis import strategies as st

from lapwing.v1 import model_pb2
from lapwing_server.answers import identity_message
from lapwing_server.attention_header import read_header
from lapwing_server.refusal import Refusal

WRONG_HEADERS: list[tuple[dict[str, Any], str, str]] = [
    ({"layers": [1, 3]}, "layers[1]", "INVALID_INPUT"),
    ({"layers": [-1, 1, 2]}, "layers[0]", "INVALID_INPUT"),
    ({"layers": [1, 2, 1]}, "layers[2]", "INVALID_INPUT"),
    ({"layers": [0, 1]}, "layers", "INVALID_INPUT"),
    ({"layers": []}, "layers", "INVALID_INPUT"),
    ({"heads": 2}, "heads", "INVALID_INPUT"),
    ({"heads": -1}, "heads", "INVALID_INPUT"),
    ({"prompt_tokens": -1}, "prompt_tokens", "INVALID_INPUT"),
    ({"prompt_tokens": CONTEXT + 1}, "prompt_tokens", "TOO_LONG"),
    ({"response_tokens": 0}, "response_tokens", "INVALID_INPUT"),
    ({"response_tokens": CONTEXT - 1}, "response_tokens", "TOO_LONG"),
    ({"model": None}, "model", "INVALID_INPUT"),
]


@pytest.mark.parametrize(("fields", "field", "reason"), WRONG_HEADERS)
def test_a_wrong_header_names_its_field(fields: dict[str, Any], field: str, reason: str) -> None:
    assert refusal_of(lambda: an_assembly(**fields)) == (field, reason)


@pytest.mark.parametrize(
    "fields",
    [{"layers": [2, 0, 1]}, {"prompt_tokens": 0}, {"prompt_tokens": CONTEXT}, {"response_tokens": CONTEXT - 2}],
)
def test_control_headers_at_the_ends_of_the_ranges_are_taken(fields: dict[str, Any]) -> None:
    an_assembly(**fields)


COMPARED = ("architecture", "parameters", "weights", "quantisation", "tokenizer", "chat_template")


@pytest.mark.parametrize("name", COMPARED)
def test_attention_of_another_model_is_refused_and_both_values_are_named(name: str) -> None:
    model = identity_message(an_identity())
    setattr(model, name, "cd" * 500 + "\x1b[2J")
    with pytest.raises(Refusal) as caught:
        an_assembly(model=model)
    assert (caught.value.field, caught.value.reason) == (f"model.{name}", "PROBE_MISMATCH")
    assert caught.value.code.name == "FAILED_PRECONDITION"
    mine = getattr(an_identity(), name)
    assert mine[:15] in caught.value.message
    assert "cdcdcdcd" in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("name", ["name", "commit"])
def test_control_what_is_for_people_is_not_compared(name: str) -> None:
    model = identity_message(an_identity())
    setattr(model, name, "something else")
    an_assembly(model=model)


def test_the_same_weights_in_another_type_are_known_by_their_sample() -> None:
    probe = a_probe(identity=replace(an_identity(), sample=SAMPLE))
    rounded = (0.5, 0.25, 1.0)
    header = read_header(a_bfloat16_header(rounded), probe, an_identity(), CONTEXT)
    assert header.rules.model_dtype == "bfloat16"
    other = a_bfloat16_header((0.5, 0.26, 1.0))
    assert refusal_of(lambda: read_header(other, probe, an_identity(), CONTEXT)) == ("model.weights", "PROBE_MISMATCH")
    without = a_bfloat16_header(rounded)
    without.ClearField("weight_sample")
    with pytest.raises(Refusal, match="compared by weight_sample, give it"):
        read_header(without, probe, an_identity(), CONTEXT)
    # The server's own model is of that type: then its sample serves.
    running = replace(an_identity(), dtype="bfloat16", weights=without.model.weights, sample=rounded)
    read_header(without, probe, running, CONTEXT)


def test_a_sample_that_is_not_that_of_the_digest_is_refused() -> None:
    header = a_bfloat16_header(SAMPLE)
    header.model.weights = "ab" * 32
    probe = a_probe()
    assert refusal_of(lambda: read_header(header, probe, an_identity(), CONTEXT))[0] == "weight_sample"
    header = a_bfloat16_header(SAMPLE)
    header.weight_sample.data += b"\0"
    assert refusal_of(lambda: read_header(header, probe, an_identity(), CONTEXT))[0] == "weight_sample"


def test_a_header_of_anything_is_refused_by_name_or_read() -> None:
    numbers = st.one_of(st.integers(-2, 5), st.sampled_from([2**31 - 1, -(2**31)]))

    @settings(max_examples=200, deadline=None)
    @given(st.lists(numbers, max_size=4), numbers, numbers, st.one_of(st.none(), numbers), st.text(max_size=8))
    def check(layers: list[int], heads: int, prompt: int, response: int | None, text: str) -> None:
        fields = {"layers": layers, "heads": heads, "prompt_tokens": prompt, "response_tokens": response}
        model = identity_message(an_identity())
        if text:
            model.CopyFrom(model_pb2.ModelIdentity(weights=text, dtype=text))
        refusal = outcome_of(lambda: an_assembly(model=model, **fields))
        if refusal is not None:
            assert refusal.field
            assert refusal.code.name in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")

    check()
