"""Log-probabilities of a response are those of the model's own logits, and the logits are never all there at once."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lapwing_detector import log_probabilities
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.log_probabilities import States, finishing, read_with_log_probabilities
from lapwing_detector.token_statistics import log_odds
from lapwing_detector.tokens import TokenIds
from tests.detector.architectures import build
from tests.detector.tiny_models import FAMILIES, OTHERS, VOCABULARY, long_model, new_model, tiny_model, token_ids

OWN_ENDS = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "recurrent_gemma": {"logits_soft_cap": 2.0},
}
"""By model type: what it does to the logits of its head."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five positions at a time."""
    monkeypatch.setattr(log_probabilities, "MOST_LOGITS", 5 * VOCABULARY + 1)


def texts() -> list[TokenIds]:
    """Prompts and responses of unlike lengths; a response without tokens and one that nothing stands before."""
    shapes = [(8, 12), (10, 3), (1, 6), (5, 0), (0, 9)]
    return [
        TokenIds(*(tuple(token_ids(length, seed=10 * number + part).tolist()) for part, length in enumerate(shape)))
        for number, shape in enumerate(shapes)
    ]


def batch(sequences: list[TokenIds]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids.all) for ids in sequences)
    rows = [[*ids.all, *[0] * (longest - len(ids.all))] for ids in sequences]
    visible = [[1] * len(ids.all) + [0] * (longest - len(ids.all)) for ids in sequences]
    return torch.tensor(rows), torch.tensor(visible)


def oracle(model: PreTrainedModel, ids: TokenIds) -> np.ndarray:
    """Each text alone, all logits at once."""
    first = max(len(ids.prompt_ids), 1)
    with torch.no_grad():
        said = model(torch.tensor([ids.all])).logits[0].double().log_softmax(-1)
    return np.array([float(said[place - 1, ids.all[place]]) for place in range(first, len(ids.all))])


def agree(model: PreTrainedModel, sequences: list[TokenIds]) -> tuple[bool, States]:
    with torch.inference_mode():
        states = States(model, *batch(sequences))
    found = states.log_probabilities(sequences)
    expected = [oracle(model, ids) for ids in sequences]
    assert [len(one) for one in found] == [len(one) for one in expected]
    apart = max((np.abs(one - other).max() for one, other in zip(found, expected, strict=True) if len(one)), default=0)
    return bool(apart < 1e-4), states


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_they_are_those_of_all_logits_at_once(family: str) -> None:
    same, states = agree(tiny_model(family), texts())
    assert same
    assert states._own.shape[1] == 1  # the head saw one position


def test_nothing_of_the_model_is_left_changed() -> None:
    model = new_model("llama")
    agree(model, texts())
    head: Any = model.get_output_embeddings()
    assert not head._forward_pre_hooks
    with torch.no_grad():
        assert model(token_ids(1, 7)).logits.shape[1] == 7


@pytest.mark.parametrize("model_type", OWN_ENDS)
def test_what_a_model_does_after_its_head_is_done_here_too(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(model_type)
    for name, value in OWN_ENDS[model_type].items():
        setattr(model.config, name, value)
        if hasattr(model, name):
            setattr(model, name, value)
    same, states = agree(model, texts()[:3])
    assert same
    assert finishing(*ends(states), model.config) is not None  # no second forward is needed
    # Control: left out, it makes a difference.
    monkeypatch.setattr(log_probabilities, "finishing", lambda raw, own, config: lambda logits: logits)
    assert not agree(model, texts()[:3])[0]


def ends(states: States) -> tuple[torch.Tensor, torch.Tensor]:
    assert states._shown is not None
    with torch.no_grad():
        return states._head(states._shown[:, -1:]), states._own


def test_a_model_that_does_more_after_its_head_is_read_a_second_time_with_all_logits() -> None:
    model = new_model("llama")
    forward, tilt, calls = model.forward, torch.linspace(-3.0, 3.0, VOCABULARY), []

    def tilted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        output = forward(*arguments, **options)
        output.logits = output.logits + tilt
        return output

    model.forward = tilted  # type: ignore[method-assign]
    with torch.inference_mode():
        states = States(model, *batch(texts()))
    assert finishing(*ends(states), model.config) is None
    states.log_probabilities(texts())
    assert len(calls) == 2
    assert agree(model, texts())[0]


def test_a_model_whose_head_is_not_told_apart_gives_its_logits_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    same, states = agree(model, texts())
    assert same
    assert states._own.shape[1] == batch(texts())[0].shape[1]


def test_of_a_sure_token_the_doubt_is_told_as_well_as_by_a_step_of_decoding() -> None:
    model = new_model("llama")
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(12.0)
        prompt, written = token_ids(1, 6), []
        ids = prompt
        for _ in range(12):
            written.append(int(model(ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[written[-1]]])], dim=1)
        exact = copy.deepcopy(model).double()(ids).logits[0].log_softmax(-1)
    text = TokenIds(tuple(prompt[0].tolist()), tuple(written))
    [found] = States(model, *batch([text])).log_probabilities([text])
    expected = np.array([float(exact[5 + place, token]) for place, token in enumerate(written)])
    assert np.exp(expected).max() > 0.99
    # The sure tokens' log-odds, which a probe reads, to the digits that a score may differ by.
    np.testing.assert_allclose(log_odds(found.astype(np.float64)), log_odds(expected), atol=1e-4)


@pytest.mark.parametrize("kind", [None, "longrope"])
def test_attention_is_that_of_a_forward_without_them_and_of_each_text_alone(kind: str | None) -> None:
    model = long_model(kind) if kind else tiny_model("llama")
    loaded = LanguageModel(model, NoTokenizer())  # type: ignore[arg-type]
    longer = TokenIds(tuple(token_ids(20, seed=7).tolist()), tuple(token_ids(20, seed=8).tolist()))
    sequences = [*texts(), longer]
    for ids, (summary, found), plain in zip(
        sequences,
        read_with_log_probabilities(loaded, sequences, {1: (0, 2)}),
        loaded.summaries([ids.all for ids in sequences], {1: (0, 2)}),
        strict=True,
    ):
        np.testing.assert_allclose(summary.received, plain.received, atol=1e-5)
        np.testing.assert_allclose(found, oracle(model, ids), atol=1e-4)
    assert read_with_log_probabilities(loaded, []) == []


class NoTokenizer:
    pad_token_id = 0
    eos_token_id = None
    model_max_length = 512


def test_logits_that_are_not_finite_are_not_hidden() -> None:
    model = new_model("llama")
    head: Any = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[3] = float("nan")
        found = States(model, *batch(texts())).log_probabilities(texts())
    assert np.isnan(found[0]).all()
