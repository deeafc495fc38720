"""The doctor: a model that is well passes, whatever is broken is found by the check that is there for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

from lapwing_detector import cli, forward, reading, tokens
from lapwing_detector.attention import attend
from lapwing_detector.cache_mark import cache_in
from lapwing_detector.capture import Captured
from lapwing_detector.doctor import examination, overhead
from lapwing_detector.doctor.bos import bos_fault
from lapwing_detector.doctor.cost import attended_pairs, cache_sizes, cached_bytes, check_cost, estimated_seconds
from lapwing_detector.doctor.examination import Diagnosis, examine, looks
from lapwing_detector.doctor.patient import Patient
from lapwing_detector.doctor.report import WIDTH, as_json, table
from lapwing_detector.doctor.verdict import Check, Skipped, difference, tolerance
from lapwing_detector.errors import CaptureError
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.summary import AttentionSummary
from tests.detector.architectures import build
from tests.detector.captures import letters
from tests.detector.test_tokens import CHAT, CHAT_WITH_BOS, byte_tokenizer
from tests.detector.tiny_models import COMMON, SHAPE, new_model

CORRECTNESS = ["layers", "eager", "batch", "generate", "bos"]
EVERY = [*CORRECTNESS, "cost", "overhead"]
BYTES = 259


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command("doctor")(cli.doctor)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tiny(family: str = "llama", tokenizer: PreTrainedTokenizerBase | None = None, **changes: object) -> LanguageModel:
    model = new_model(family, vocab_size=BYTES, **changes)
    return LanguageModel(model, tokenizer or byte_tokenizer(template=CHAT_WITH_BOS + CHAT), family)


def quickly(language_model: LanguageModel) -> Diagnosis:
    return examine(language_model, quick=True)


def found(diagnosis: Diagnosis, name: str) -> Check:
    return next(check for check in diagnosis.checks if check.name == name)


# Well.


def test_atlas_is_well_and_the_json_holds_every_check():
    result = run("--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["ok"] is True
    assert list(told["checks"]) == EVERY
    states = {name: check["state"] for name, check in told["checks"].items()}
    assert states == {**dict.fromkeys(CORRECTNESS, "ok"), "cost": "measured", "overhead": "measured"}
    assert (told["model"]["name"], told["model"]["dtype"], told["model"]["context"]) == ("atlas", "float32", 256)
    numbers = {name: check["numbers"] for name, check in told["checks"].items()}
    assert numbers["layers"]["layers"][5] == {"index": 5, "kind": "full_attention", "captured": True, "heads": 8}
    assert numbers["generate"]["new_tokens"] == 12
    assert numbers["bos"]["counts"] == {"text": 1, "messages": 1}
    assert [one["tokens"] for one in numbers["cost"]["lengths"]] == [1024, 8192, 32768]
    assert not numbers["cost"]["lengths"][-1]["measured"]
    assert all(one["beyond_context"] and one["seconds"] > 0 for one in numbers["cost"]["lengths"])
    assert numbers["overhead"]["rival"] == "sdpa"
    for work in ("prefill", "decode"):
        assert 0 < numbers["overhead"][work]["low"] <= numbers["overhead"][work]["high"]


def test_the_table_has_a_line_for_every_check_and_ends_in_what_it_comes_to():
    result = run("--quick")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("atlas: LlamaForCausalLM, 3,246,528 parameters, float32 on cpu")
    starts = [line.split()[:2] for line in lines if line and not line.startswith(" ")][1:-1]
    assert starts == [*([name, "ok"] for name in CORRECTNESS), ["cost", "measured"]]
    assert "-  not measured" in result.stdout
    assert "longer than its context of 256" in result.stdout
    assert lines[-1] == "All is well."
    assert max(map(len, lines)) <= WIDTH


def test_help_teaches_with_an_example():
    assert "Example: lapwing doctor meta-llama/Llama-3.1-8B" in run("--help").stdout


def test_every_check_is_announced_in_order():
    begun: list[str] = []
    examine(tiny(), quick=True, begin=begun.append)
    assert begun == list(looks(quick=True)) == [*CORRECTNESS, "cost"]
    assert list(looks()) == EVERY


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("llama", "3 of 3 captured (0-2), 4 heads each, by the attention interface; all full attention"),
        ("mistral", "all sliding attention of 16"),
        ("gemma2", "2 sliding attention of 16 (0, 2), 1 full attention (1)"),
        ("lfm2", "1 of 3 captured (1), 4 heads each, by the attention interface; 2 conv (0, 2), 1 full attention (1)"),
        ("gpt_oss", "3 of 3 captured"),
        ("gpt2", "all full attention"),
    ],
)
def test_families_are_well_and_their_layers_named(family, said):
    language_model = tiny(family)
    diagnosis = quickly(language_model)
    assert diagnosis.wrong == []
    assert said in found(diagnosis, "layers").said
    assert found(diagnosis, "eager").state == "ok"


def test_a_window_that_the_text_does_not_reach_is_told():
    short, long = (found(quickly(tiny("mistral", sliding_window=window)), "eager") for window in (16, 400))
    assert not short.numbers["within_window"]
    assert "window" not in short.said
    assert long.numbers["within_window"]
    assert "96 tokens, within its window of 400" in long.said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_well_with_a_word_on_what_it_hides(dtype, monkeypatch):
    result = run("--quick", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert f"Rounding hides small differences in {dtype}" in result.stdout
    monkeypatch.setattr(reading, "attend", scaled(1.5))  # control: what is really wrong is seen all the same
    assert "wrong: eager." in run("--quick", "--dtype", dtype).stdout


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(broken, monkeypatch):
    if broken:
        monkeypatch.setattr("lapwing_detector.doctor.comparisons.eager_summary", fails)
        monkeypatch.setattr(reading, "attend", fails)
    language_model = tiny()
    model = language_model.model
    before = {name: tuple(value) for name, value in vars(model).items() if isinstance(value, dict)}
    assert bool(quickly(language_model).wrong) == broken
    assert model.config._attn_implementation == "sdpa"
    assert {name: tuple(value) for name, value in vars(model).items() if isinstance(value, dict)} == before
    assert "generate" not in vars(model)
    assert not model.training


# Broken, one thing at a time.


def fails(*_: object, **__: object) -> Any:
    raise RuntimeError("out of\norder")


def mapless(*_: object) -> Any:
    raise Skipped("no maps here")


def scaled(factor: float, where: Callable[[torch.Tensor], bool] = lambda query: True) -> Callable[..., Any]:
    """Attention with other scores, in the calls that are chosen by their query."""

    def wrong(query: torch.Tensor, *rest: Any, scaling: float, **others: Any) -> Any:
        return attend(query, *rest, scaling=scaling * (factor if where(query) else 1), **others)

    return wrong


def everything_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = forward.Forward.report
    monkeypatch.setattr(forward.Forward, "report", lambda *call: replace(real(*call), counted=None))


def test_control_wrong_scores_differ_from_eager_and_the_exit_code_tells(monkeypatch):
    monkeypatch.setattr(reading, "attend", scaled(1.1))
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


def test_control_an_output_that_is_not_the_models_changes_its_logits(monkeypatch):
    def louder(*call: Any, **rest: Any) -> Any:
        output, diagonal, received = attend(*call, **rest)
        return output * 1.1, diagonal, received

    language_model = tiny(num_hidden_layers=1)  # no later layer's sums would show it
    assert quickly(language_model).wrong == []
    monkeypatch.setattr(reading, "attend", louder)
    assert found(quickly(language_model), "eager").said.startswith("capturing changes its logits by")
    monkeypatch.setattr("lapwing_detector.doctor.comparisons.eager_summary", mapless)
    diagnosis = quickly(language_model)  # also where there are no maps to compare with
    assert diagnosis.wrong == ["eager"]


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


# The tokenizer.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"template": CHAT_WITH_BOS + CHAT}, "'<s>' (id 1) 1 in text, 1 in messages"),
        ({"template": CHAT}, "1 in text, 1 in messages"),
        ({}, "1 in text; there is no chat template"),
        ({"adds_bos": False, "template": CHAT}, "is not put in front by the tokenizer: 0 in text, 0 in messages"),
        ({"adds_bos": False, "template": CHAT_WITH_BOS + CHAT + "{{ bos_token }}"}, "0 in text, 2 in messages"),
    ],
)
def test_one_bos_or_a_word_on_why_there_is_none(options, said):
    check = found(quickly(tiny(tokenizer=byte_tokenizer(**options))), "bos")
    assert check.state == "ok"
    assert said in check.said


def test_a_tokenizer_without_bos_is_said_and_not_failed():
    tokenizer = byte_tokenizer(adds_bos=False)
    tokenizer.bos_token = None
    check = found(quickly(tiny(tokenizer=tokenizer)), "bos")
    assert (check.state, check.numbers["bos"]) == ("ok", None)
    assert "no BOS token" in check.said


def test_control_a_template_that_writes_bos_behind_a_newline_is_found():
    tokenizer = byte_tokenizer(template="{{ '\n' + bos_token }}" + CHAT)
    diagnosis = quickly(tiny(tokenizer=tokenizer))
    assert diagnosis.wrong == ["bos"]
    assert found(diagnosis, "bos").said.startswith("messages: BOS stands 2 times; once is right")


def test_control_a_doubled_bos_is_found(monkeypatch):
    monkeypatch.setattr(tokens, "_opened", lambda tokenizer, ids: (tokenizer.bos_token_id, *ids))
    diagnosis = quickly(tiny())
    assert diagnosis.wrong == ["bos"]
    assert found(diagnosis, "bos").numbers["counts"] == {"text": 1, "messages": 2}
    assert "one behind the other" in found(diagnosis, "bos").said


@pytest.mark.parametrize(
    ("ids", "adds", "is_text", "fault"),
    [
        ((1, 5, 6), True, True, None),
        ((5, 6), False, True, None),
        ((1, 5, 1, 6), False, False, None),  # a template that marks turns with it
        ((5, 1), True, True, "in front"),
        ((5, 6), True, False, "0 times"),
        ((1, 5, 1), True, False, "2 times"),
        ((1, 1, 5), False, False, "twice"),
        ((1, 5), False, True, "tokenizer puts none"),
    ],
)
def test_what_is_wrong_with_bos_tokens(ids, adds, is_text, fault):
    said = bos_fault(ids, 1, adds, is_text)
    assert said is None if fault is None else fault in said


def test_a_tokenizer_of_another_model_is_found():
    diagnosis = quickly(LanguageModel(new_model("llama"), byte_tokenizer()))
    assert diagnosis.wrong == ["layers", "eager", "batch", "generate"]
    assert "use the tokenizer that belongs to the model" in found(diagnosis, "layers").said


# What can't be checked.


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
    assert told["checks"]["bos"]["state"] == "ok"  # of the tokenizer, which is not refused
    rest = [name for name in EVERY if name not in ("layers", "bos")]
    assert {told["checks"][name]["state"] for name in rest} == {"skipped"}


def test_a_refused_model_is_well_by_the_fallback(falcon):
    result = run(falcon, "--quick", "--fallback", "eager")
    assert result.exit_code == 0, result.output
    assert "4 of 4 captured (0-3), 4 heads each, by the eager fallback" in result.stdout


def test_where_eager_attention_cannot_be_run_it_is_said():
    class WithoutMaps(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("output_attentions"):
                raise ValueError("no maps here")
            return super().forward(*args, **kwargs)

    model = WithoutMaps(LlamaConfig(**{**COMMON, **SHAPE, "vocab_size": BYTES})).eval()
    diagnosis = quickly(LanguageModel(model, byte_tokenizer(), "mapless"))
    assert diagnosis.wrong == []
    assert model.config._attn_implementation == "sdpa"  # though it failed in between
    assert found(diagnosis, "eager").state == "skipped"
    assert "its eager attention can't be run: ValueError: no maps here" in found(diagnosis, "eager").said
    assert table(diagnosis).splitlines()[-1] == "Nothing is wrong; not checked: eager."


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


# Differences.


def summary(received: float = 1.0) -> AttentionSummary:
    values = np.ones((1, 2, 9), np.float32)
    return AttentionSummary(values.copy(), values * received, (4,))


def test_a_difference_is_relative_above_one_and_knows_its_place():
    other = summary(10.0)
    other.received[0, 1, 3] += 1.0
    one = difference(other, summary(10.0))
    assert (one.largest, one.median, one.layer, one.head) == (pytest.approx(0.1), 0.0, 4, 1)
    assert difference(summary(), summary()).largest == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_never_within_the_tolerance(dtype):
    other = summary()
    assert tolerance(dtype).allows(difference(other, summary()))
    other.diagonal[0, 0, 0] = np.nan
    assert difference(other, summary()).largest == np.inf
    assert not tolerance(dtype).allows(difference(other, summary()))


def test_summaries_of_other_texts_are_not_compared():
    with pytest.raises(CaptureError, match="both must be of the same"):
        difference(summary(), replace(summary(), layers=(3,)))


# Cost.


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


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_time_is_drawn_out_by_tokens_and_by_the_pairs_that_attend(family):
    patient = Patient(tiny(family))

    def seconds(tokens: int) -> float:
        return 1e-4 * tokens + 1e-8 * attended_pairs(patient, tokens)

    measured = {tokens: seconds(tokens) for tokens in (512, 1024, 2048)}
    assert estimated_seconds(patient, measured, 32768) == pytest.approx(seconds(32768))


def test_noise_makes_no_share_of_the_time_negative():
    patient = Patient(tiny())
    assert estimated_seconds(patient, {1024: 1.0, 2048: 1.5}, 8192) == pytest.approx(6.0)  # no pairs, only tokens
    assert estimated_seconds(patient, {1024: 0.1, 2048: 1.6}, 8192) == pytest.approx(25.6)  # no tokens, only pairs
    assert estimated_seconds(patient, {1024: 1.0}, 8192) is None


def test_a_window_makes_far_tokens_cost_nothing():
    sliding, full = Patient(tiny("mistral")), Patient(tiny("llama"))
    assert attended_pairs(full, 4096) == 3 * 4096**2 / 2
    assert attended_pairs(sliding, 8192) - attended_pairs(sliding, 4096) == 3 * 16 * 4096
    assert attended_pairs(sliding, 8) == attended_pairs(full, 8)


def test_the_overhead_is_the_ratio_of_medians_and_the_quartiles_of_pairs():
    told = overhead.ratio(lambda captured: 3.0 if captured else 2.0)
    assert (told["ratio"], told["low"], told["high"]) == (1.5, 1.5, 1.5)
    assert (told["seconds"], told["rival_seconds"]) == (3.0, 2.0)
    assert told["repetitions"] >= overhead.REPETITIONS
