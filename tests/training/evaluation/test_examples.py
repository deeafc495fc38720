"""The surest mistakes, with their texts and, by the model itself, the shares of their tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_fakes import LAPLACIAN, WORDS, make_table, write_store

from lapwing_detector.detector import Detector
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.log_probabilities import read_with_log_probabilities
from lapwing_detector.probe import Probe
from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.errors import ModelMismatch
from lapwing_training.evaluation.examples import LONGEST_TEXT, worst_examples, worst_rows
from lapwing_training.probe.train import TrainOptions, train_probe
from lapwing_training.store.extract import ExtractOptions, extract_features


def items(count: int = 100) -> list[LabelledGeneration]:
    rng = np.random.default_rng(0)
    return [
        LabelledGeneration(
            id=f"q{number}",
            prompt=" ".join(rng.choice(WORDS, 5)),
            response=" ".join(rng.choice(WORDS, 3)),
            group=f"g{number}",
            label=number % 2,
        )
        for number in range(count)
    ]


OPTIONS = TrainOptions(features=(LAPLACIAN,), k=2, heads=2, test_share=0.3, resamples=5)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Probe, LanguageModel]:
    folder, loaded = tmp_path_factory.mktemp("examples"), LanguageModel.load(tiny_model)
    extract_features(items(), folder / "store", loaded, ExtractOptions((LAPLACIAN,), k=4))
    return train_probe(folder / "store", folder / "probe", OPTIONS, loaded), loaded


def test_the_surest_mistakes_come_first_and_ties_are_told_apart_by_their_logits() -> None:
    labels = np.array([1, 1, 1, 0, 0, 0])
    probabilities = np.array([0.5, 0.5, 0.9, 0.5, 0.8, 0.5])
    logits = np.array([0.2, 0.1, 2.0, -0.3, 1.0, 0.4])
    assert worst_rows(probabilities, logits, labels) == {"missed": [1, 0, 2], "false_alarms": [4, 5, 3]}
    many = worst_rows(np.linspace(0, 1, 100), np.zeros(100), np.arange(100) % 2)
    assert (many["missed"][0], many["false_alarms"][0], len(many["missed"])) == (1, 98, 10)


def test_tokens_have_the_shares_that_the_detector_gives(trained: tuple[Probe, LanguageModel]) -> None:
    probe, loaded = trained
    detector, texts = Detector(loaded, probe), {item.id: item for item in items()}
    for side in ("missed", "false_alarms"):
        assert probe.metrics["examples"][side]
        for one in probe.metrics["examples"][side]:
            item = texts[one["id"]]
            found = detector.score(item.prompt, item.response)
            assert "".join(one["tokens"]).replace(" ", "").endswith(item.response.replace(" ", ""))
            # Rounded to six digits.
            np.testing.assert_allclose(one["contributions"], found.token_contributions, atol=1e-6)
            assert sum(one["contributions"]) == pytest.approx(found.logit - found.bias, abs=1e-4)


def test_a_probe_that_reads_log_probabilities_colours_by_them_too(
    trained: tuple[Probe, LanguageModel], tmp_path: Path
) -> None:
    loaded = trained[1]
    extract_features(items(), tmp_path / "store", loaded, ExtractOptions((LAPLACIAN,), k=4))
    probe = train_probe(tmp_path / "store", tmp_path / "probe", replace(OPTIONS, recipe="combined"), loaded)
    texts = {item.id: item for item in items()}
    for one in probe.metrics["examples"]["missed"]:
        ids = Detector(loaded, trained[0]).tokens(texts[one["id"]].prompt, texts[one["id"]].response)
        [(summary, said)] = read_with_log_probabilities(loaded, [ids])
        logit, share = probe.score(summary, said)
        np.testing.assert_allclose(one["contributions"], share.tokens, atol=1e-5)
        assert sum(one["contributions"]) == pytest.approx(logit - probe.bias, abs=1e-4)


def test_a_model_that_is_not_that_of_the_store_is_refused_before_the_fit(
    trained: tuple[Probe, LanguageModel], tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", make_table(rows=60))
    with pytest.raises(ModelMismatch, match=r"the store comes from tiny with .* --model, or none"):
        train_probe(store, tmp_path / "probe", OPTIONS, trained[1])


def test_long_texts_and_messages_are_shortened_and_kept_as_text(trained: tuple[Probe, LanguageModel]) -> None:
    from lapwing_training.evaluation.nested import fit, trial_of
    from lapwing_training.evaluation.plan import plan_rows
    from lapwing_training.recipes.fit import LapwingRecipe

    table = make_table(rows=80)
    recipe = LapwingRecipe((LAPLACIAN,), 4, heads=np.array([0]), strength=0.1)
    trial = trial_of(fit(table, recipe, 0), table, plan_rows(table, None, guarantee=False, seed=0))
    chat = ({"role": "user", "content": "where?"}, {"role": "assistant", "content": "here"})
    long = {item.id: replace(item, response="x" * 5000, prompt=None, messages=chat) for item in items(80)}
    [one, *_] = worst_examples(trial, long, trained[0])["missed"]
    assert one["prompt"] == "user: where?\nassistant: here"
    assert len(one["response"]) == LONGEST_TEXT + 2
    json.dumps(one)
