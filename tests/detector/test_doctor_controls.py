"""The doctor: whatever is broken is found by the check that is there for it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lapwing_detector import forward, native, reading
from lapwing_detector.attention import attend
from lapwing_detector.capture import Captured
from lapwing_detector.doctor.patient import logits_changed
from lapwing_detector.doctor.report import as_json
from lapwing_detector.language_model import LanguageModel
from tests.detector.test_doctor import BYTES, found, mapless, quickly, run, scaled, tiny
from tests.detector.test_tokens import byte_tokenizer
from tests.detector.tiny_models import COMMON, SHAPE


def everything_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = forward.Forward.report
    monkeypatch.setattr(forward.Forward, "report", lambda *call: replace(real(*call), counted=None))


def test_control_wrong_scores_differ_from_eager_and_the_exit_code_tells(monkeypatch):
    monkeypatch.setattr(reading, "attend", scaled(1.1))
    monkeypatch.setattr(native, "supports_row", lambda *tensors: False)  # or steps of decoding went elsewhere
    result = run("--quick")
    assert result.exit_code == 1
    assert "eager     FAILED" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Something is wrong: eager.")
    told = json.loads(run("--quick", "--json").stdout)
    assert not told["ok"]
    assert [name for name, check in told["checks"].items() if check["state"] == "failed"] == ["eager"]
    assert told["checks"]["eager"]["numbers"]["differences"]["to its own maps"]["largest"] > 0.1


def test_control_padding_that_counts_fails_the_batch(monkeypatch):
    assert quickly(tiny()).wrong == []
    monkeypatch.setattr(native, "available", lambda: False)  # in C, padding attends to nothing but padding
    everything_counts(monkeypatch)
    assert quickly(tiny()).wrong == ["batch", "generate"]  # of which two prompts are padded


def test_control_steps_with_other_scores_fail_generating(monkeypatch):
    monkeypatch.setattr(reading, "attend", scaled(1.1, lambda query: query.shape[2] == 1))
    assert quickly(tiny()).wrong == ["generate"]


def test_control_a_newest_token_without_its_row_fails_generating(monkeypatch):
    monkeypatch.setattr(Captured, "complete", lambda self: None)
    diagnosis = quickly(tiny())
    assert diagnosis.wrong == ["generate"]
    assert "(4, 59) heads and tokens of layers [0, 1, 2] against (4, 60)" in found(diagnosis, "generate").said


# In half precision what is only a tenth too loud is within the rounding of one layer.
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.1), (torch.float16, 1.1), (torch.bfloat16, 1.5)])
def test_control_an_output_that_is_not_the_models_changes_its_logits(dtype, factor, monkeypatch):
    def louder(*call: Any, **rest: Any) -> Any:
        output, diagonal, received = attend(*call, **rest)
        return output * factor, diagonal, received

    language_model = tiny(num_hidden_layers=1)  # no later layer's sums would show it
    language_model.model.to(dtype)
    assert quickly(language_model).wrong == []
    monkeypatch.setattr(reading, "attend", louder)
    assert found(quickly(language_model), "eager").said.startswith("capturing changes its logits by")
    monkeypatch.setattr("lapwing_detector.doctor.comparisons.eager_summary", mapless)
    diagnosis = quickly(language_model)  # also where there are no maps to compare with
    assert diagnosis.wrong == ["eager"]


def test_the_median_lets_a_rerouted_token_off_and_nothing_that_is_not_finite():
    theirs = torch.ones(9, 5)
    ours = theirs.clone()
    ours[4] += 0.5
    assert logits_changed(ours, theirs, "median") == 0.0
    assert logits_changed(ours, theirs, "largest") == 0.5
    ours[:5] += 0.5  # control: most of them
    assert logits_changed(ours, theirs, "median") == 0.5
    ours[0, 0] = float("nan")
    assert logits_changed(ours, theirs, "median") == float("inf")


def test_control_numbers_that_are_not_finite_are_named_by_their_layer():
    language_model = tiny()
    with torch.no_grad():
        language_model.model.model.layers[1].self_attn.q_proj.weight.fill_(float("nan"))
    diagnosis = quickly(language_model)
    assert "layers" in diagnosis.wrong
    assert found(diagnosis, "layers").said.startswith("the attention of layers 1-2 is not finite")
    told = json.loads(as_json(diagnosis))  # JSON knows no infinity
    assert told["checks"]["batch"]["numbers"]["differences"]["to each alone"]["largest"] is None


def test_control_a_model_that_pads_wrongly_by_itself_is_said_to():
    class Unmasked(LlamaForCausalLM):
        def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            if attention_mask is not None and not attention_mask.all():
                kwargs["position_ids"] = torch.zeros_like(attention_mask)
            return super().forward(*args, attention_mask=attention_mask, **kwargs)

    torch.manual_seed(7)
    model = Unmasked(LlamaConfig(**{**COMMON, **SHAPE, "vocab_size": BYTES})).eval()
    diagnosis = quickly(LanguageModel(model, byte_tokenizer()))
    assert diagnosis.wrong == ["batch", "generate"]
    assert "the model itself does something else there" in found(diagnosis, "batch").said
