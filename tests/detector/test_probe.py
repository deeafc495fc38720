"""A probe is one linear map: its score, its shares and its thresholds."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from lapwing_detector.calibration import Calibration
from lapwing_detector.errors import ProbeMismatch, TooShort
from lapwing_detector.features import FEATURES
from tests.detector.probes import random_identity, random_maps, random_probe, summary_of

ALL = tuple(FEATURES)


@pytest.mark.parametrize("features", [(feature,) for feature in ALL] + [ALL])
@pytest.mark.parametrize("tokens", [3, 4, 17])
def test_the_shares_of_tokens_and_of_heads_each_sum_to_logit_minus_bias(features, tokens):
    probe = random_probe(features=features)
    summary = summary_of(random_maps(2, 4, tokens, seed=tokens))
    logit, share = probe.score(summary)
    # The features come as float32, the shares in float64: 1e-5 of sums of order one.
    assert logit == pytest.approx(probe.logit(probe.features_of(summary)), abs=1e-5)
    assert share.tokens.sum() == pytest.approx(logit - probe.bias, abs=1e-5)
    assert share.heads.sum() == pytest.approx(logit - probe.bias, abs=1e-5)
    assert share.tokens.shape == (tokens,)
    assert not share.heads[~probe.selected].any()


def test_a_token_that_no_rank_belongs_to_has_no_share_and_one_that_moves_the_score_has():
    # Every row attends to token 0 alone, but token 2 to itself: its eigenvalue is the only one that is not 0.
    maps = np.zeros((1, 1, 5, 5))
    maps[..., :, 0] = 1.0
    maps[0, 0, 2] = [0, 0, 1, 0, 0]
    probe = random_probe(layers=1, heads=1, features=("attention_eigenvalues.v1",), k=2)
    probe = replace(probe, selected=np.array([[True]]), weights=np.array([[[1.0, 1.0]]], np.float32))
    _, share = probe.score(summary_of(maps))
    assert share.tokens.tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]  # the two entries of the diagonal that are 1


def test_several_items_are_scored_as_one_by_one():
    probe = random_probe()
    features = np.stack([probe.features_of(summary_of(random_maps(2, 4, 9, seed))) for seed in range(5)])
    logits, chances = probe.logit(features), probe.probability(features)
    assert logits.shape == chances.shape == (5,)
    assert logits.tolist() == pytest.approx([probe.logit(one) for one in features], abs=1e-12)
    assert chances.tolist() == pytest.approx([1 / (1 + math.exp(-(1.5 * one - 0.5))) for one in logits], abs=1e-12)


@pytest.mark.parametrize("logit", [-1e6, -30.0, 0.0, 30.0, 1e6])
def test_calibration_neither_overflows_nor_leaves_its_range(logit):
    assert 0.0 <= Calibration(2.0, 0.1).probability(logit) <= 1.0
    assert Calibration(2.0, 0.0).probability(logit) + Calibration(2.0, 0.0).probability(-logit) == pytest.approx(1.0)


def test_a_logit_on_the_threshold_is_not_flagged_and_one_above_is():
    probe = random_probe()
    assert probe.flagged_at(1.0) == (0.10,)
    assert probe.flagged_at(math.nextafter(1.0, 2.0)) == (0.05, 0.10)
    assert probe.flagged_at(9.0) == (0.01, 0.05, 0.10)
    assert probe.threshold(0.05).logit == 1.0
    assert probe.threshold(0.2) is None


def test_too_few_tokens_are_refused_and_never_padded():
    probe = random_probe(k=5)
    with pytest.raises(TooShort, match="4 tokens"):
        probe.score(summary_of(random_maps(2, 4, 4)))
    assert math.isfinite(probe.score(summary_of(random_maps(2, 4, 5)))[0])


def test_attention_of_another_shape_is_refused():
    with pytest.raises(ProbeMismatch, match=r"layers \(0, 1, 2\) of 4"):
        random_probe().score(summary_of(random_maps(3, 4, 9)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"weights": np.zeros((2, 4, 5), np.float32)}, r"must be \(2, 4, 4\)"),
        ({"features": ("attention_score.v2",)}, "known are attention_score.v1"),
        ({"bias": math.nan}, "finite"),
        ({"k": 0}, "at least 1"),
        ({"features": ()}, "one or more"),
        ({"layers": (1, 0)}, "ascending"),
        ({"name": "../up"}, "must match"),
        ({"selected": np.zeros((2, 4), bool)}, "not selected has a weight"),
    ],
)
def test_a_probe_that_contradicts_itself_cannot_be_made(change, expected):
    with pytest.raises(ValueError, match=expected):
        replace(random_probe(), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"bias": 0.26},
        {"calibration": Calibration(1.5, -0.4)},
        {"identity": random_identity(1)},
        {"k": 3, "name": "other"},
    ],
)
def test_the_revision_changes_with_all_that_changes_a_score(change):
    probe = random_probe()
    assert replace(probe, **change).revision != probe.revision
    assert replace(probe, metrics={}).revision == probe.revision


def test_head_maps_are_those_stored_or_follow_from_the_weights():
    probe = random_probe()
    stored = probe.head_map("attention_score.v1", "P_VALUE")
    assert np.array_equal(stored.values, probe.statistics["attention_score.v1/P_VALUE"])
    weight = probe.head_map("laplacian_eigenvalues.v1", "WEIGHT").values
    assert np.allclose(weight, np.sqrt((probe.weights[..., 1:] ** 2).sum(-1)))
    assert np.array_equal(probe.head_map("attention_score.v1", "SELECTED").values, probe.selected)
    with pytest.raises(ValueError, match=r"it has attention_score\.v1, laplacian_eigenvalues\.v1"):
        probe.head_map("sink_scores.v1", "P_VALUE")
    with pytest.raises(ValueError, match="known are P_VALUE"):
        probe.head_map("attention_score.v1", "MEAN")


def test_a_probe_is_loaded_and_scores_without_torch(tmp_path):
    random_probe().save_pretrained(tmp_path / "probe")
    code = (
        "import sys; from lapwing_detector import Probe; "
        f"probe = Probe.from_pretrained({str(tmp_path / 'probe')!r}); "
        "print(probe.revision, 'torch' in sys.modules, 'sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [random_probe().revision, "False", "False"]
