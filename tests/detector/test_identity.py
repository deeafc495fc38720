"""A model is recognised by what it computes, not by where it lies or how it was loaded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lapwing_detector.embedded import model_path
from lapwing_detector.errors import ProbeMismatch
from lapwing_detector.identity import ModelIdentity, identity_of, rounded
from tests.detector.probes import random_identity, random_probe


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes | changes)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def identity(tokenizer) -> ModelIdentity:
    return identity_of(llama(), tokenizer)


def what_differs(mine: ModelIdentity, theirs: ModelIdentity) -> set[str]:
    return {what for what, _, _ in mine.differences(theirs)}


def test_a_saved_and_loaded_model_is_the_same(identity, tokenizer, tmp_path):
    llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = identity_of(loaded, AutoTokenizer.from_pretrained(tmp_path), "another name")
    assert theirs.name != identity.name
    assert what_differs(identity, theirs) == set()
    assert theirs.digest == identity.digest


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_how_attention_is_computed_does_not_matter(identity, tokenizer, implementation):
    model = llama()
    model.set_attn_implementation(implementation)
    assert what_differs(identity, identity_of(model, tokenizer)) == set()


def test_padding_and_truncation_that_calls_leave_behind_do_not_matter(identity):
    used = AutoTokenizer.from_pretrained(model_path())
    used(["one", "one two"], padding=True, truncation=True, max_length=3)
    assert what_differs(identity, identity_of(llama(), used)) == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_the_same_model_and_other_weights_in_it_are_not(identity, tokenizer, dtype):
    assert what_differs(identity, identity_of(llama().to(dtype), tokenizer)) == set()
    assert "weights" in what_differs(identity, identity_of(llama(seed=1).to(dtype), tokenizer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_are_off_by_little_are_others_in_a_coarser_dtype_as_well(identity, tokenizer, dtype):
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    assert "weights" in what_differs(identity, identity_of(model.to(dtype), tokenizer))


def test_bfloat16_and_float16_of_one_model_are_that_model(tokenizer):
    half, brain = (identity_of(llama().to(dtype), tokenizer) for dtype in (torch.float16, torch.bfloat16))
    assert what_differs(half, brain) == set()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_that_of_torch(dtype):
    values = torch.cat([torch.randn(2000), torch.randn(200) * 1e-6, torch.tensor([0.0, -0.0, 1.0, 65504.0])])
    theirs = values.to(getattr(torch, dtype)).float().numpy()
    assert np.array_equal(rounded(values.numpy(), dtype), theirs)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, {"weights"}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"architecture"}),
        ({"num_key_value_heads": 2}, {"architecture", "parameters", "weights"}),
        ({"rms_norm_eps": 1e-5}, {"architecture"}),
    ],
)
def test_another_model_is_another(identity, tokenizer, changes, expected):
    assert what_differs(identity, identity_of(llama(**changes), tokenizer)) == expected


def test_another_tokenizer_or_chat_template_is_another(identity):
    other = AutoTokenizer.from_pretrained(model_path())
    other.add_tokens(["<new>"])
    assert what_differs(identity, identity_of(llama(), other)) == {"tokenizer"}
    other = AutoTokenizer.from_pretrained(model_path())
    other.chat_template = "{{ messages[0]['content'] }}"
    assert what_differs(identity, identity_of(llama(), other)) == {"chat_template"}


def test_quantisation_is_refused_even_where_the_sample_agrees(identity):
    other = replace(identity, quantisation="bitsandbytes")
    assert what_differs(identity, other) == {"quantisation"}
    assert other.digest != identity.digest


def test_a_json_round_trip_changes_nothing(identity):
    assert ModelIdentity.from_dict(identity.to_dict()) == identity


def test_a_probe_refuses_another_model_with_both_values_and_the_mend():
    probe, theirs = random_probe(), random_identity(tokenizer="f" * 64, name="other-model")
    with pytest.raises(ProbeMismatch) as caught:
        probe.require(theirs)
    message = str(caught.value)
    for part in ("tokenizer", probe.identity.tokenizer[:12], "ffffffffffff", "lapwing train", "other-model"):
        assert part in message
    probe.require(replace(random_identity(), name="renamed", commit="abc"))
