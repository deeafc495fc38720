"""A probe that reads log-probabilities, too, says so everywhere, needs them, and still shares out its whole score."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from lapwing_detector.errors import ProbeMismatch
from lapwing_detector.pictures import heading
from lapwing_detector.probe import Probe
from lapwing_detector.token_statistics import TOKEN_STATISTICS, token_contributions, token_statistics
from tests.detector.probes import random_maps, random_probe, summary_of

WEIGHTS = {"minimum_log_odds.v1": -0.4, "mean_log_probability.v1": 0.9}
SAID = np.array([-0.1, -2.5, -0.7], np.float32)


def both() -> Probe:
    return replace(random_probe(), statistic_weights=WEIGHTS)


@pytest.mark.parametrize("response", [0, 1, 3, 9])
def test_tokens_on_one_side_and_heads_with_statistics_on_the_other_sum_to_logit_minus_bias(response: int) -> None:
    said = -np.random.default_rng(response).exponential(size=response)
    summary = summary_of(random_maps(2, 4, 9, seed=response))
    logit, share = both().score(summary, said)
    assert share.tokens.sum() == pytest.approx(logit - 0.25, abs=1e-5)
    assert share.heads.sum() + sum(share.statistics.values()) == pytest.approx(logit - 0.25, abs=1e-5)
    assert share.statistics.keys() == WEIGHTS.keys()
    # What the log-probabilities add is the response's: its tokens are the last ones.
    plain, without = random_probe().score(summary)
    added, _ = token_contributions(said, WEIGHTS)
    np.testing.assert_allclose(share.tokens - without.tokens, [*np.zeros(9 - response), *added], atol=1e-5)
    assert logit - plain == pytest.approx(added.sum())


def test_many_items_are_scored_as_one_by_one() -> None:
    summaries = [summary_of(random_maps(2, 4, 9, seed)) for seed in range(3)]
    features = np.stack([both().features_of(summary) for summary in summaries])
    statistics = np.stack([token_statistics(SAID - seed) for seed in range(3)])
    logits = [both().score(summary, SAID - seed)[0] for seed, summary in enumerate(summaries)]
    assert both().logit(features, statistics).tolist() == pytest.approx(logits, abs=1e-5)
    assert both().probability(features, statistics)[1] == pytest.approx(both().calibration.probability(logits[1]))
    assert both().probability(features[1], statistics[1]) == pytest.approx(both().calibration.probability(logits[1]))


def test_without_log_probabilities_it_refuses_and_a_probe_of_attention_alone_passes_them_over() -> None:
    summary = summary_of(random_maps(2, 4, 9))
    for ask in (both().score, lambda one: both().logit(both().features_of(one))):
        with pytest.raises(ProbeMismatch, match="reads more than attention: the log-probabilities"):
            ask(summary)
    plain = random_probe()
    assert plain.score(summary, SAID)[0] == plain.score(summary)[0]
    assert (plain.reads_log_probabilities, both().reads_log_probabilities) == (False, True)


def test_it_comes_back_as_it_was_saved_in_a_version_that_readers_of_the_first_refuse(tmp_path) -> None:
    probe = Probe.from_pretrained(both().save_pretrained(tmp_path / "both"))
    assert probe.statistic_weights == WEIGHTS
    assert probe.revision == both().revision != random_probe().revision
    assert replace(both(), statistic_weights={**WEIGHTS, "minimum_log_odds.v1": -0.5}).revision != probe.revision
    versions = [
        json.loads((one.save_pretrained(tmp_path / name) / "manifest.json").read_text())["schema_version"]
        for name, one in (("plain", random_probe()), ("both", both()))
    ]
    assert versions == [1, 2]


def test_card_and_picture_say_that_it_reads_more_than_attention(tmp_path) -> None:
    for name, probe, says in (("both", both(), True), ("plain", random_probe(), False)):
        card = (probe.save_pretrained(tmp_path / name) / "README.md").read_text()
        assert ("reads more than attention" in card) == says
        assert ("log-probabilities" in heading(probe, "attention_score.v1", "SELECTED")) == says


@pytest.mark.parametrize("weights", [{"mean_attention.v1": 1.0}, {next(iter(TOKEN_STATISTICS)): np.inf}])
def test_statistics_that_are_not_known_or_have_no_finite_weight_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be finite and one of mean_log_probability"):
        replace(random_probe(), statistic_weights=weights)
