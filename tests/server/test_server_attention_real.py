"""Models that run beside the server: what it says of their attention is what the library says of it here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_fakes import FLOAT16
from engine_fakes import FakeEngine, a_probe
from service_fakes import Running
from test_server_real import a_model
from transformers import StoppingCriteria, StoppingCriteriaList

from lapwing_client import Client, InvalidRequest, PreconditionFailed
from lapwing_detector import Detector, Probe, capture_attention, embedded, identity_of
from lapwing_server.engine import Loaded, loader
from lapwing_server.shelf import Shelf, Shelved
from tests.detector.tiny_models import new_model

SAME_NUMBERS = 1e-5
"""The same sums in float32, read by the same code."""

ANOTHER_WAY = 1e-4
"""Attention computed another way: step by step against one forward, or by transformers' eager attention."""

PROMPT, NEW = [256, *b"Where is the lapwing at home?"], 24
SCRIPT = Path(__file__).parents[2] / "client" / "examples" / "own_model.py"


@dataclass(frozen=True)
class World:
    """A model, its probe, and a server that has the probe."""

    model: Any
    probe: Probe
    client: Client
    engine: Any

    @property
    def header(self) -> dict[str, Any]:
        """What every stream says."""
        return {"model": self.probe.identity, "prompt_tokens": len(PROMPT)}

    def here(self, captured: Any) -> float:
        """The score by the library."""
        return self.probe.score(captured.summaries()[0])[0]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    model, tokenizer = a_model()
    probe = replace(a_probe(identity=identity_of(model, tokenizer)), layers=(0, 1))
    detector = Detector.from_pretrained(model, probe, tokenizer=tokenizer)
    shelf = Shelf((Shelved(probe.name, probe, ""),), probe)
    with Running(load=lambda: Loaded(detector, shelf)) as server, Client(server.target) as client:
        yield World(model, probe, client, detector)


def generate(model: Any, **options: Any) -> Any:
    return model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, do_sample=False, **options
    )


class After(StoppingCriteria):
    """Calls back after every token, and never stops."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.call(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_three_lines_around_a_generation(world: World) -> None:
    with capture_attention(world.model) as captured:
        generate(world.model)
    detection = world.client.score_attention(captured.chunks(), **world.header)
    assert detection.logit == pytest.approx(world.here(captured), abs=SAME_NUMBERS)
    assert detection.response_tokens == NEW


def test_only_the_heads_of_the_probe_are_needed(world: World) -> None:
    with capture_attention(world.model, heads=world.probe.heads) as captured:
        generate(world.model)
    chunks = captured.chunks(max_bytes=2000)
    assert any(np.isnan(chunk.received).any() for chunk in chunks)
    detection = world.client.score_attention(chunks, **world.header)
    assert detection.logit == pytest.approx(world.here(captured), abs=SAME_NUMBERS)


def test_control_a_head_of_the_probe_that_was_not_kept_is_missed(world: World) -> None:
    heads = {layer: of_layer[1:] for layer, of_layer in world.probe.heads.items()}
    with capture_attention(world.model, heads=heads) as captured:
        generate(world.model)
    with pytest.raises(InvalidRequest) as caught:
        world.client.score_attention(captured.chunks(), **world.header)
    assert (caught.value.field, caught.value.reason) == ("summary.diagonal", "NON_FINITE")


def test_every_running_score_is_that_of_the_prefix(world: World) -> None:
    """By Score, of the same token ids, in one forward each."""
    seen: list[tuple[int, float | None]] = []
    with (
        capture_attention(world.model) as captured,
        world.client.attention_stream(layers=captured.layers, heads=3, **world.header) as stream,
    ):

        def look(ids: torch.Tensor) -> None:
            for chunk in captured.chunks(final=False):
                stream.send(chunk)
            detection = stream.score_now()
            seen.append((ids.shape[1] - 1, detection.logit))

        ids = generate(world.model, stopping_criteria=StoppingCriteriaList([After(look)]))[0].tolist()
        for chunk in captured.chunks():
            stream.send(chunk)
        last = stream.finish()
    assert seen[0] == (len(PROMPT), None), "nothing was written yet"
    assert len(seen) == NEW
    for tokens, logit in (*seen[1:], (len(ids), last.logit)):
        expected = world.client.score(PROMPT, ids[len(PROMPT) : tokens])
        assert logit == pytest.approx(expected.logit, abs=ANOTHER_WAY)
    assert last.logit == pytest.approx(world.here(captured), abs=SAME_NUMBERS)
    assert len({round(logit, 3) for _, logit in seen[1:] if logit is not None}) > NEW // 2, "control: they differ"


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Inside, the model computes whole maps."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation("sdpa")


def eager_rows(model: Any, dtype: Any) -> Iterator[dict[str, Any]]:
    """The model's own attention maps, as transformers gives them out step by step."""
    with eager(model):
        result = generate(model, output_attentions=True, return_dict_in_generate=True)
        last = model(result.sequences, output_attentions=True).attentions  # the newest token's row is not among them
    steps = [*result.attentions, tuple(layer[:, :, -1:] for layer in last)]
    first = 0
    for step in steps:
        weights = (
            torch.stack([layer[0] for layer in step]).float().numpy().astype(dtype)
        )  # (layers, heads, rows, columns)
        yield {"first_layer": 0, "first_head": 0, "first_token": first, "weights": weights}
        first += weights.shape[2]


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, ANOTHER_WAY), (np.float16, FLOAT16)])
def test_rows_of_the_models_own_maps(world: World, dtype: Any, tolerance: float) -> None:
    with capture_attention(world.model) as captured:
        generate(world.model)
    chunks = list(eager_rows(world.model, dtype))
    detection = world.client.score_attention(chunks, layers=(0, 1), heads=3, **world.header)
    assert detection.response_tokens == NEW
    assert detection.logit == pytest.approx(world.here(captured), abs=tolerance)


def test_a_model_in_bfloat16_is_known_and_scored(world: World) -> None:
    """Another type shifts the scores; that it is the same model is told from the sample of its weights."""
    model, tokenizer = a_model()
    model = model.bfloat16()
    identity = identity_of(model, tokenizer)
    assert identity.weights != world.probe.identity.weights
    with capture_attention(model) as captured:
        generate(model)
    detection = world.client.score_attention(captured.chunks(), model=identity, prompt_tokens=len(PROMPT))
    assert detection.logit == pytest.approx(world.here(captured), abs=SAME_NUMBERS)
    rows = list(eager_rows(model, np.float32))
    assert max(abs(chunk["weights"].sum(-1) - 1).max() for chunk in rows) > 1e-3, "rounded by the model itself"
    options = {"layers": (0, 1), "heads": 3, "prompt_tokens": len(PROMPT)}
    assert world.client.score_attention(rows, model=identity, **options).logit
    with pytest.raises(InvalidRequest, match="does not add up to 1"):
        world.client.score_attention(rows, model=world.probe.identity, **options)
    other = replace(identity, sample=())
    with pytest.raises(PreconditionFailed, match="weight_sample"):
        world.client.score_attention(captured.chunks(from_start=True), model=other, prompt_tokens=len(PROMPT))


def test_another_model_is_refused(world: World) -> None:
    model, tokenizer = a_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    with capture_attention(model) as captured:
        generate(model)
    with pytest.raises(PreconditionFailed) as caught:
        world.client.score_attention(captured.chunks(), model=identity_of(model, tokenizer), prompt_tokens=len(PROMPT))
    assert (caught.value.field, caught.value.reason) == ("header.model.weights", "PROBE_MISMATCH")


def test_a_model_with_sinks_is_scored_as_here() -> None:
    model, tokenizer = new_model("gpt_oss"), a_model()[1]
    probe = replace(a_probe(layers=3, heads=4, identity=identity_of(model, tokenizer)), layers=(0, 1, 2))
    engine = FakeEngine(identity=probe.identity)
    shelf = Shelf((Shelved(probe.name, probe, ""),), probe)
    with Running(engine, shelf=shelf) as server, Client(server.target) as client, torch.no_grad():
        with capture_attention(model) as captured:
            model(torch.arange(12, 40)[None])
        known: dict[str, Any] = {"model": probe.identity, "prompt_tokens": 5}
        detection = client.score_attention(captured.chunks(), **known)
        assert detection.logit == pytest.approx(probe.score(captured.summaries()[0])[0], abs=SAME_NUMBERS)
        with pytest.raises(InvalidRequest) as caught:
            client.score_attention(captured.chunks(from_start=True), attention_sinks=False, **known)
        assert caught.value.reason == "NOT_ATTENTION"


# The embedded model, and the example.


@pytest.fixture(scope="module")
def atlas() -> Iterator[tuple[Any, Client, str]]:
    loaded = loader()()
    with Running(load=lambda: loaded) as server, Client(server.target) as client:
        yield loaded, client, server.target


def test_the_embedded_model(atlas: tuple[Any, Client, str]) -> None:
    loaded, client, _ = atlas
    probe, engine = loaded.shelf.active, loaded.engine
    prompt = list(engine.tokens("Question: In which country is Bergen?\nAnswer:").prompt_ids)
    with capture_attention(engine.model) as captured:
        ids = engine.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
    summary = captured.summaries()[0]
    detection = client.score_attention(captured.chunks(), model=engine.identity, prompt_tokens=len(prompt))
    assert detection.logit == pytest.approx(probe.score(summary)[0], abs=SAME_NUMBERS)
    again = client.score(prompt, ids[len(prompt) : summary.token_count])
    assert detection.logit == pytest.approx(again.logit, abs=ANOTHER_WAY)
    assert detection.probability == pytest.approx(again.probability, abs=ANOTHER_WAY)


def test_the_embedded_model_by_rows_in_float16(atlas: tuple[Any, Client, str]) -> None:
    """Its probe takes logarithms of the diagonal, of which float16 would lose a good part."""
    loaded, client, _ = atlas
    probe, model, tokens = loaded.shelf.active, loaded.engine.model, 24
    ids = torch.arange(100, 100 + tokens)[None]
    with capture_attention(model) as captured, torch.no_grad():
        model(ids)
    summary = captured.summaries()[0]
    with eager(model):
        maps = model(ids, output_attentions=True).attentions
    chunk = {
        "first_layer": 0,
        "first_head": 0,
        "first_token": 0,
        "weights": torch.stack([layer[0] for layer in maps]).half().numpy(),
        "diagonal": summary.diagonal,
    }
    known = {"model": probe.identity, "layers": range(6), "heads": 8, "prompt_tokens": 5}
    found, expected = client.score_attention([chunk], **known).logit, probe.score(summary)[0]
    of_sums = float(np.abs(probe.weights[..., 1:]).sum())  # its first feature is of the diagonal alone
    assert found == pytest.approx(expected, abs=of_sums * 2**-11)
    with pytest.raises(InvalidRequest) as caught:
        client.score_attention([chunk | {"diagonal": None}], **known)
    assert caught.value.field == "rows.diagonal"


@pytest.mark.parametrize("arguments", [(), ("--live",)], ids=["afterwards", "live"])
def test_the_example_with_the_model_in_another_process(
    atlas: tuple[Any, Client, str], arguments: tuple[str, ...]
) -> None:
    command = [sys.executable, str(SCRIPT), atlas[2], "--probe", str(embedded.probe_path()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["logit"] == pytest.approx(report["logit_here"], abs=SAME_NUMBERS)
    assert 0.0 < report["probability"] < 1.0
    assert (" tokens: " in done.stderr) == ("--live" in arguments)
