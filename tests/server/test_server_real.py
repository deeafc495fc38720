"""The real detector behind the server: the same scores by rpc as by the library, for the same token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import pytest
import torch
from service_fakes import Running, a_probe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lapwing_client import Client, InvalidRequest
from lapwing_client.results import GeneratedToken, Generation
from lapwing_detector.detector import Detector
from lapwing_detector.errors import InvalidInput
from lapwing_detector.identity import identity_of
from lapwing_server.engine import Loaded, real_detector, warm_up
from lapwing_server.shelf import Shelf, Shelved

VOCABULARY = 258
CONTEXT = 512

TEXTS = [
    ("Where is the lapwing at home?", "On wet meadows."),
    ("Q", "A longer response, of several words, which says nothing true at all."),
    ("Vogel", "Kiebitz, täuscht einen gebrochenen Flügel vor 🐦"),
]


def a_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random model of two layers that reads bytes."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,  # with the usual 0.02 attention is so flat that a mistake would not show
        bos_token_id=256,
        eos_token_id=257,
    )
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def detector() -> Detector:
    model, tokenizer = a_model()
    probe = replace(a_probe(identity=identity_of(model, tokenizer)), layers=(0, 1))
    return Detector.from_pretrained(model, probe, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def client(detector: Detector) -> Iterator[Client]:
    shelf = Shelf((Shelved(detector.probe.name, detector.probe, ""),), detector.probe)
    with Running(detector, load=lambda: Loaded(detector, shelf)) as server, Client(server.target) as client:  # type: ignore[arg-type]
        yield client


def test_warm_up_scores(detector: Detector) -> None:
    warm_up(detector, detector.probe)


@pytest.mark.parametrize(("prompt", "response"), TEXTS)
def test_the_same_score_by_rpc_as_by_the_library(
    client: Client, detector: Detector, prompt: str, response: str
) -> None:
    expected, found = detector.score(prompt, response), client.score(prompt, response)
    assert found.logit == pytest.approx(expected.logit, abs=1e-5)  # float32
    assert found.probability == pytest.approx(expected.probability, abs=1e-5)
    assert found.token_ids == expected.token_ids
    assert found.token_contributions == pytest.approx(expected.token_contributions.tolist(), abs=1e-5)
    assert sum(found.token_contributions) + found.bias == pytest.approx(found.logit, abs=1e-5)
    assert sum(head.contribution for head in found.strongest_heads) + found.bias == pytest.approx(found.logit, abs=1e-5)


def test_the_same_score_in_a_batch(client: Client) -> None:
    alone = [client.score(prompt, response).logit for prompt, response in TEXTS]
    together = [result.logit for result in client.score_batch(TEXTS)]  # type: ignore[union-attr]
    assert together == pytest.approx(alone, abs=1e-5)


def test_control_other_ids_have_another_score(client: Client) -> None:
    first, second = (client.score("Where is it?", response).logit for response in ("In Oslo.", "In Rome."))
    assert first != pytest.approx(second, abs=1e-4)


def test_a_live_score_is_the_score_of_the_same_ids(client: Client) -> None:
    *tokens, last = client.generate("Where is the lapwing at home?", max_new_tokens=12, temperature=1.0, seed=1)
    assert isinstance(last, Generation)
    assert all(isinstance(token, GeneratedToken) for token in tokens)
    assert [token.token_id for token in tokens[: len(last.token_ids)]] == list(last.token_ids)
    again = client.score(last.prompt_token_ids, last.token_ids)
    assert last.detection.logit == pytest.approx(again.logit, abs=1e-4)  # decoding steps against one forward
    assert tokens[-1].probability is not None


def test_a_score_between_two_tokens_changes_neither(client: Client) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 5}
    undisturbed = list(client.generate("Once upon a time", **options))
    alone = client.score(*TEXTS[0]).logit
    disturbed = []
    for event in client.generate("Once upon a time", **options):
        disturbed.append(event)
        assert client.score(*TEXTS[0]).logit == pytest.approx(alone, abs=1e-5)
    for one, other in zip(undisturbed[:-1], disturbed[:-1], strict=True):
        assert isinstance(one, GeneratedToken)
        assert isinstance(other, GeneratedToken)
        assert (one.token_id, one.text) == (other.token_id, other.text)
        assert one.logit == pytest.approx(other.logit, abs=1e-5)


def test_two_interleaved_generations_are_those_of_each_alone(client: Client) -> None:
    def write(seed: int) -> Any:
        return client.generate("Once upon a time", max_new_tokens=8, temperature=1.0, seed=seed)

    alone = [list(write(seed))[-1].token_ids for seed in (1, 2)]
    taking_turns = list(zip_longest(write(1), write(2)))
    together = [[pair[i] for pair in taking_turns if pair[i] is not None][-1].token_ids for i in (0, 1)]
    assert together == alone
    assert alone[0] != alone[1]


@pytest.mark.parametrize(
    ("prompt", "response", "field"),
    [
        ("Q", [1, 2, 3, VOCABULARY], "response.token_ids[3]"),
        ([256, -1], "A", "prompt.token_ids[1]"),
        ("Q", "x" * CONTEXT, "response"),
        ("x" * (CONTEXT + 1), "A", "prompt"),
        ([{"role": "user", "content": "Q"}], "A", "prompt"),
    ],
)
def test_wrong_input_names_its_field(client: Client, prompt: Any, response: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.score(prompt, response)
    assert caught.value.field == field


def test_too_short_for_the_probe_is_no_error(client: Client) -> None:
    detection = client.score([256], [1])
    assert (detection.state, detection.reason, detection.probability) == ("UNSCORED", "TOO_SHORT", None)


def test_a_model_that_is_not_there_is_told_in_words(detector: Detector) -> None:
    with pytest.raises(InvalidInput, match="can't be loaded as a causal language model"):
        real_detector("/nowhere/at/all", detector.probe)
