"""The doctor: a model that is well passes, and what is asked of it in the shell is answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import typer
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

from lapwing_detector import cli, reading
from lapwing_detector.attention import attend
from lapwing_detector.doctor.comparisons import check_eager
from lapwing_detector.doctor.examination import Diagnosis, examine, looks
from lapwing_detector.doctor.patient import Patient
from lapwing_detector.doctor.report import WIDTH
from lapwing_detector.doctor.verdict import Check, Skipped
from lapwing_detector.language_model import LanguageModel
from tests.detector.architectures import build
from tests.detector.captures import letters
from tests.detector.test_tokens import CHAT, CHAT_WITH_BOS, byte_tokenizer
from tests.detector.tiny_models import new_model

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


def fails(*_: object, **__: object) -> Any:
    raise RuntimeError("out of\norder")


def mapless(*_: object) -> Any:
    raise Skipped("no maps here")


def scaled(factor: float, where: Callable[[torch.Tensor], bool] = lambda query: True) -> Callable[..., Any]:
    """Attention with other scores, in the calls that are chosen by their query."""

    def wrong(query: torch.Tensor, *rest: Any, scaling: float, **others: Any) -> Any:
        return attend(query, *rest, scaling=scaling * (factor if where(query) else 1), **others)

    return wrong


def test_atlas_is_well_and_the_json_holds_every_check():
    result = run("--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["ok"] is True
    assert told["skipped"] == []
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
    assert "the context is 256" in result.stdout
    assert result.stdout.count("beyond it") == 3
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
    assert short.numbers["within"] == {}
    assert "window" not in short.said
    assert long.numbers["within"] == {"sliding_attention": 400}
    assert "96 tokens, within its window of 400" in long.said


def test_chunks_are_named_and_whether_the_text_reaches_their_edge():
    language_model = LanguageModel(build("llama4_text"), letters())
    diagnosis = quickly(language_model)
    assert diagnosis.wrong == []
    assert "3 chunked attention of 16 (0-2), 1 full attention (3)" in found(diagnosis, "layers").said
    assert found(diagnosis, "layers").numbers["reaches"] == {"chunked_attention": 16}
    assert found(diagnosis, "eager").numbers["within"] == {}
    language_model.model.config.attention_chunk_size = 400
    assert "tokens, within its chunk of 400" in found(quickly(language_model), "eager").said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_well_with_a_word_on_what_it_hides(dtype, monkeypatch):
    result = run("--quick", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert f"Rounding hides small differences in {dtype}" in result.stdout
    monkeypatch.setattr(reading, "attend", scaled(1.5))  # control: what is really wrong is seen all the same
    assert check_eager(Patient(LanguageModel.load(None, dtype=dtype))).state == "failed"


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
