"""The doctor where a check can't be made: skipped for reasons that are named, and failed for all others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lapwing_detector.cli import in_the_shell
from lapwing_detector.doctor import examination
from lapwing_detector.doctor.examination import examine
from lapwing_detector.doctor.report import as_json, table
from lapwing_detector.doctor.verdict import Check
from lapwing_detector.language_model import LanguageModel
from tests.detector.architectures import build
from tests.detector.captures import letters
from tests.detector.test_doctor import BYTES, CORRECTNESS, EVERY, fails, found, quickly, run, tiny
from tests.detector.test_tokens import byte_tokenizer
from tests.detector.tiny_models import COMMON, SHAPE


@pytest.fixture(scope="module")
def falcon(tmp_path_factory) -> Path:
    """A directory of a model whose attention does not go through the interface."""
    place = tmp_path_factory.mktemp("models") / "falcon"
    build("falcon").save_pretrained(place)
    letters().save_pretrained(place)
    return place


def test_a_refused_model_is_refused_with_the_reason(falcon):
    result = run(falcon, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["checks"]["layers"]["state"] == "failed"
    assert "FalconForCausalLM does not use transformers' attention interface" in told["checks"]["layers"]["said"]
    assert f"lapwing doctor {falcon} --fallback eager" in told["checks"]["layers"]["said"]
    assert told["skipped"] == ["eager", "batch", "generate", "cost", "overhead"]
    assert told["checks"]["bos"]["state"] == "ok"  # of the tokenizer, which is not refused
    rest = [name for name in EVERY if name not in ("layers", "bos")]
    assert {told["checks"][name]["state"] for name in rest} == {"skipped"}


def test_a_refused_model_is_well_by_the_fallback(falcon):
    result = run(falcon, "--quick", "--fallback", "eager")
    assert result.exit_code == 0, result.output
    assert "4 of 4 captured (0-3), 4 heads each, by the eager fallback" in result.stdout


@pytest.mark.parametrize("named", [True, False])
def test_a_refused_model_that_the_fallback_would_take_is_told_what_to_type(falcon, named):
    model = str(falcon) if named else ""
    diagnosis = in_the_shell(quickly(LanguageModel(build("falcon"), letters())), model)
    typed = f"lapwing doctor {falcon} --fallback eager" if named else "lapwing doctor --fallback eager"
    assert found(diagnosis, "layers").said.endswith(f"slower: {typed}")


def with_maps(change: Callable[[Any], Any]) -> LanguageModel:
    """A model whose own maps are other ones."""

    class Other(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if kwargs.get("output_attentions"):
                output.attentions = change(output.attentions)
            return output

    return LanguageModel(tiny_llama(Other), byte_tokenizer(), "other")


def tiny_llama(kind: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    torch.manual_seed(7)
    return kind(LlamaConfig(**{**COMMON, **SHAPE, "vocab_size": BYTES})).eval()


def raises(error: Exception) -> Callable[[Any], Any]:
    def instead(maps: Any) -> Any:
        raise error

    return instead


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (raises(ValueError("output_attentions is not supported")), "output_attentions is not supported"),
        (raises(NotImplementedError("nothing here")), "it has no eager attention: nothing here"),
        (lambda maps: None, "no eager attention that hands over maps"),
        (lambda maps: (None,) * len(maps), "no eager attention that hands over maps"),
    ],
)
def test_a_model_without_eager_maps_is_not_compared_with_them(change, said):
    language_model = with_maps(change)
    diagnosis = quickly(language_model)
    assert (diagnosis.wrong, diagnosis.skipped) == ([], ["eager"])
    assert said in found(diagnosis, "eager").said
    assert language_model.model.config._attn_implementation == "sdpa"  # though it failed in between
    told = json.loads(as_json(diagnosis))
    assert (told["ok"], told["skipped"]) == (True, ["eager"])
    assert table(diagnosis).splitlines()[-1] == "Nothing is wrong; not checked: eager."


def test_maps_without_the_sinks_are_not_compared():
    class GraniteSWAForCausalLM(LlamaForCausalLM):
        pass

    diagnosis = quickly(LanguageModel(tiny_llama(GraniteSWAForCausalLM), byte_tokenizer()))
    assert (diagnosis.wrong, diagnosis.skipped) == ([], ["eager"])
    assert "before its learned sinks took their share" in found(diagnosis, "eager").said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (raises(ValueError("broken")), "its eager attention breaks: ValueError: broken"),
        (raises(RuntimeError("broken")), "its eager attention breaks: RuntimeError: broken"),
        (raises(TypeError("broken")), "its eager attention breaks: TypeError: broken"),
        (raises(AttributeError("broken")), "its eager attention breaks: AttributeError: broken"),
        (lambda maps: maps[:2], "gave 2 maps, 3 layers are captured"),
        (lambda maps: [one[..., :9] for one in maps], "gave 0 maps, 3 layers are captured"),
        (lambda maps: [maps[0][:, :2], *maps[1:]], "differ in their number of heads: [2, 4]"),
        (lambda maps: [one[:, :2] for one in maps], "heads and tokens of layers [0, 1, 2] against (2, "),
    ],
)
def test_eager_attention_that_breaks_or_gives_other_maps_fails(change, said):
    diagnosis = quickly(with_maps(change))
    assert (diagnosis.wrong, diagnosis.skipped) == (["eager"], [])
    assert said in found(diagnosis, "eager").said


def test_control_a_models_own_maps_are_right():
    assert quickly(with_maps(lambda maps: maps)).wrong == []


@pytest.mark.parametrize("name", EVERY)
def test_one_check_that_fails_does_not_stop_the_others_and_only_those_of_correctness_decide(name, monkeypatch):
    group = examination.DECIDING if name in CORRECTNESS else examination.MEASURING
    other = {one: lambda patient, one=one: Check(one, "measured", "") for one in examination.MEASURING}
    monkeypatch.setattr(examination, "MEASURING", {**other, **({} if group is examination.DECIDING else {name: fails})})
    if name in CORRECTNESS:
        monkeypatch.setitem(examination.DECIDING, name, fails)
    diagnosis = examine(tiny())
    assert [check.name for check in diagnosis.checks] == EVERY
    assert found(diagnosis, name).said == "RuntimeError: out of order"
    assert found(diagnosis, name).state == ("failed" if name in CORRECTNESS else "skipped")
    assert diagnosis.wrong == ([name] if name in CORRECTNESS else [])


def test_a_directory_that_is_not_there_is_named(tmp_path):
    missing = tmp_path / "nothing-here"
    result = run(missing, "--json")
    assert result.exit_code == 1
    assert f"lapwing doctor: model: {str(missing)!r} can't be loaded" in result.stderr
    assert json.loads(result.stdout)["ok"] is False
    assert str(missing) in json.loads(result.stdout)["error"]
    assert run(missing).stdout == ""


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--dtype", "int4", "known are float32, bfloat16, float16"),
        ("--fallback", "flash", "known is eager"),
        ("--device", "abacus", "can't be used here"),
    ],
)
def test_misuse_exits_with_2_and_what_is_known(option, value, said):
    result = run(option, value)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
