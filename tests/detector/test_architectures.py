"""Every causal language model that can be built is captured or refused by name, and the table says which."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lapwing_detector import reading
from lapwing_detector.capture import capture_attention
from lapwing_detector.errors import CaptureError
from lapwing_detector.layers import attention_layers
from tests.detector.architecture_findings import SAME, OverCache, find, run_over_cache
from tests.detector.architecture_mechanisms import ATTEND, MATTERS
from tests.detector.architecture_runs import RUNS
from tests.detector.architecture_table import PLACE, WRITE, table
from tests.detector.architectures import ODD, build, model_types
from tests.detector.tiny_models import captured_forward, token_ids

TYPES = model_types()
BUILT = [model_type for model_type in TYPES.values() if model_type not in ODD]

# fmt: off
BY_FALLBACK = {
    "axk2", "bloom", "codegen", "deepseek_v32", "dots3_note_text", "falcon", "glm_moe_dsa", "got_ocr2", "gpt_neo",
    "gpt_neox_japanese", "gptj", "hy_v4", "megatron-bert", "minimax_m3_vl_text", "mpt", "openai-gpt",
    "qwen4_exp_text", "rembert", "roformer", "xglm", "xlm",
}
REFUSED = {
    "bart", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "deepseek_v4", "diffllama",
    "doge", "falcon_mamba", "git", "hrm_text", "inkling2_text", "inkling_text", "longcat_flash", "mamba", "mamba2",
    "marian", "mbart", "mllama", "mvp", "pegasus", "phi4_multimodal", "plbart", "prophetnet", "rwkv", "trocr",
    "whisper", "xlnet", "xlstm",
}
# fmt: on
CAPTURED = [model_type for model_type in BUILT if model_type not in BY_FALLBACK | REFUSED]

HYBRID = "layers without attention"

ASKED_FOR = {
    "bamba": {HYBRID},
    "cohere": {"grouped heads"},
    "cohere2": {"window"},
    "deepseek_v3": {"latent"},
    "gemma2": {"window", "soft-cap", "own scale"},
    "gemma3": {"window", "own scale"},
    "gemma3_text": {"window", "own scale"},
    "gemma4_text": {"window", "own scale"},
    "glm4": {"grouped heads"},
    "gpt2": {"own scale"},
    "gpt_neox": set(),
    "gpt_oss": {"window", "sinks"},
    "granite": {"own scale"},
    "granite_swa": {"window", "sinks", "own scale"},
    "granitemoehybrid": {"own scale", HYBRID},
    "jamba": {HYBRID},
    "llama": {"grouped heads"},
    "llama4_text": {"chunks"},
    "ministral": {"window"},
    "mistral": {"window", "grouped heads"},
    "mixtral": {"window"},
    "olmo2": {"grouped heads"},
    "olmo3": {"window"},
    "opt": {"own scale"},
    "phi": {"grouped heads"},
    "phi3": {"window"},
    "qwen2": {"window"},
    "qwen2_moe": {"window"},
    "qwen3": {"window"},
    "qwen3_5_text": {HYBRID},
    "qwen3_moe": {"window"},
    "qwen3_next": {HYBRID},
    "smollm3": {"window"},
    "stablelm": {"grouped heads"},
    "starcoder2": {"window"},
    "zamba2": {HYBRID},
}
"""Families that people run, and mechanisms that the tiny model of each must have."""


@pytest.mark.parametrize("model_type", BUILT)
def test_captured_as_it_is_or_refused_by_name(model_type: str) -> None:
    finding = find(model_type)  # an error that is none of the detector's fails here
    assert (finding.refusal is None) == (model_type in CAPTURED)
    assert finding.fallback == (model_type in BY_FALLBACK)
    if model_type in REFUSED:
        return
    assert finding.eager < SAME
    assert finding.logits < SAME
    assert set(finding.over_cache) == set(RUNS)
    for run, outcome in finding.over_cache.items():
        assert isinstance(outcome, str) or outcome.eager < SAME, run


def test_few_are_not_captured_over_a_cache() -> None:
    without = {one.model_type for one in map(find, BUILT) if any(isinstance(o, str) for o in one.over_cache.values())}
    assert without == {"minimax", "openai-gpt", "recurrent_gemma", "xlm"}


def wrong_over_a_cache(*inputs: Tensor, **rest: Any) -> Any:
    """In place of `attend`: the sums of rows behind others belong to the head before."""
    output, diagonal, received = ATTEND(*inputs, **rest)
    if rest["first"] > 0:
        diagonal, received = diagonal.roll(1, dims=1), received.roll(1, dims=1)
    return output, diagonal, received


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("model_type", ["bamba", "jamba", "zamba", "zamba2", "nemotron_h", "moshi", "roberta"])
def test_control_sums_that_are_wrong_over_a_cache_are_seen(model_type: str, run: str) -> None:
    # Of models that attend otherwise over a cache than in one forward.
    with patch.object(reading, "attend", wrong_over_a_cache):
        assert run_over_cache(run, model_type, build(model_type)).eager > MATTERS


@pytest.mark.parametrize("model_type", CAPTURED)
def test_control_every_mechanism_matters(model_type: str) -> None:
    finding = find(model_type)
    assert {"window", "scale"} <= set(finding.broken)
    hides = {"window", "chunks"} & set(finding.mechanisms)
    for mechanism, error in finding.broken.items():
        if mechanism == "window" and not hides:
            assert error < SAME  # there was nothing to switch off
        else:
            assert error > MATTERS, mechanism


@pytest.mark.parametrize("model_type", ASKED_FOR)
def test_families_that_people_run(model_type: str) -> None:
    finding = find(model_type)
    assert finding.refusal is None
    assert set(finding.mechanisms) >= ASKED_FOR[model_type]
    assert {"scale", "head order"} <= set(finding.broken)


def test_refusals_name_the_fallback_where_it_helps() -> None:
    refused = [finding for finding in map(find, BUILT) if finding.refusal is not None]
    helped = {finding.model_type for finding in refused if finding.fallback}
    named = {finding.model_type for finding in refused if 'fallback="eager"' in str(finding.refusal)}
    assert {"falcon", "bloom", "mpt", "gptj", "gpt_neo", "deepseek_v32"} <= helped <= named
    assert named - helped == {"big_bird", "cpmant", "deepseek_v4", "xlnet"}  # which show only as they run


def test_refusals_name_the_class_or_the_layer() -> None:
    refused = [finding for finding in map(find, BUILT) if finding.refusal is not None]
    assert find("falcon") in refused
    for finding in refused:
        names = [finding.class_name, *(name for name, _ in build(finding.model_type).named_modules() if "." in name)]
        assert any(name in str(finding.refusal) for name in names), finding.refusal


def test_a_tower_beside_the_decoder_is_not_captured() -> None:
    model = build("gemma3")
    assert not any("vision" in layer.name for layer in attention_layers(model))
    assert captured_forward(model, token_ids(1, 5))[0].layers == (0, 1, 2, 3)
    # As if an image were read within the forward.
    tower, image = model.model.vision_tower, torch.zeros(1, 3, 224, 224)
    model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: tower(image) and None)
    with capture_attention(model), torch.no_grad(), pytest.raises(CaptureError, match="give text only"):
        model(token_ids(1, 5))


def test_the_table_is_what_was_found() -> None:
    assert set(ODD) < set(TYPES.values())
    odd = [(model_type, name, ODD[model_type]) for name, model_type in TYPES.items() if model_type in ODD]
    written = table(map(find, BUILT), odd)
    if WRITE in os.environ:
        PLACE.write_text(written)
    assert PLACE.read_text() == written, f"write it anew with {WRITE}=1"


def test_control_the_table_tells_outcomes_apart() -> None:
    finding = find("llama")
    others = [
        replace(finding, refusal="a reason; a mend"),
        replace(finding, refusal="a reason; a mend", fallback=True),
        replace(finding, mechanisms=("window",)),
        replace(finding, rival="eager"),
        replace(finding, over_cache={"chunks": OverCache(eager=0, forward=2 * SAME)}),
        replace(finding, over_cache={"chunks": OverCache(eager=2 * SAME, forward=0)}),
        replace(finding, over_cache={"chunks": "refused, a reason"}),
        replace(finding, over_cache={"chunks": "refused, a reason", "generating": OverCache(eager=0, forward=0)}),
    ]
    texts = {table([one], []) for one in [finding, *others]}
    assert len(texts) == 1 + len(others)
    assert table([replace(finding, eager=SAME / 9)], []) in texts  # roundings are none of its business
