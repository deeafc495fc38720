"""Sequences with probes of their own are scored in one forward, each as if it were alone with its probe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lapwing_detector import language_model
from lapwing_detector.detection import Reason
from lapwing_detector.detector import Detector
from lapwing_detector.errors import DetectorError, ProbeMismatch
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.probe import Probe
from lapwing_detector.scoring import ScoreJob
from tests.detector.probes import random_identity, random_probe
from tests.detector.stream_schedules import forwards_of

ITEMS = [("Where is Lyon?", "In France, on the Rhone."), ("Who sings?", "A bird does, early in the morning of a day.")]


@pytest.fixture(scope="module")
def detector() -> Detector:
    loaded = LanguageModel.load()
    probe = random_probe(layers=6, heads=8, k=10, identity=loaded.identity)
    return Detector.from_pretrained(loaded.model, probe, tokenizer=loaded.tokenizer)


def a_shadow(detector: Detector, layer: int, name: str) -> Probe:
    """One that reads all heads of one layer."""
    selected = np.zeros_like(detector.probe.selected)
    selected[layer] = True
    weights = np.ones_like(detector.probe.weights) * selected[..., None]
    return replace(detector.probe, name=name, selected=selected, weights=weights)


def test_each_probe_reads_what_it_needs_from_one_forward(detector: Detector) -> None:
    first, second = a_shadow(detector, 5, "first"), a_shadow(detector, 2, "second")
    ids = [detector.tokens(*item) for item in ITEMS]
    jobs = [ScoreJob(ids[0], detector.probe, 0.1, (first, second)), ScoreJob(ids[1], second)]
    with forwards_of(detector.model) as seen:
        scored = detector.score_ids(jobs)
    assert seen == [(2, max(len(one.all) for one in ids))]
    alone = [Detector(detector.language_model, probe).score(*ITEMS[0]) for probe in (detector.probe, first, second)]
    found = [scored[0].detection, *scored[0].shadows]
    for one, other in zip(found, alone, strict=True):
        assert one.logit == pytest.approx(other.logit, abs=1e-5)
        assert one.probe_name == other.probe_name
        assert one.heads_contribution == pytest.approx(other.logit - other.bias, abs=1e-5)
        assert one.statistic_contributions == {}
    assert len({one.logit for one in found}) == 3
    assert [one.false_positive_rate for one in found] == [0.1] * 3
    assert scored[1].shadows == ()
    assert scored[1].detection.probe_name == "second"
    assert detector.score_ids([]) == []


def of_layers(probe: Probe, *layers: int) -> Probe:
    """One that knows no others."""
    rows = [probe.layers.index(layer) for layer in layers]
    ones = np.ones_like(probe.weights[rows])
    return replace(probe, layers=layers, weights=ones, selected=np.ones_like(probe.selected[rows]), statistics={})


def test_probes_of_other_layers_share_a_forward(detector: Detector) -> None:
    ids, some = detector.tokens(*ITEMS[0]), of_layers(detector.probe, 1, 3)
    jobs = [ScoreJob(ids, detector.probe, shadows=(some,)), ScoreJob(ids, some, shadows=(detector.probe,))]
    alone = [detector.score_ids([ScoreJob(ids, probe)])[0].detection.logit for probe in (detector.probe, some)]
    together = [[one.detection.logit, one.shadows[0].logit] for one in detector.score_ids(jobs)]
    assert together[0] == pytest.approx(alone, abs=1e-5)
    assert together[1] == pytest.approx(alone[::-1], abs=1e-5)


def test_only_the_heads_that_its_probes_read_are_captured(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    real = language_model.capture_attention
    monkeypatch.setattr(
        language_model,
        "capture_attention",
        lambda model, heads=None: asked.append(heads) or real(model, heads=heads),
    )
    fresh = Detector.from_pretrained(detector.model, a_shadow(detector, 4, "one"), tokenizer=detector.tokenizer)
    fresh.score(*ITEMS[0])
    assert asked == [{4: tuple(range(8))}]
    asked.clear()
    jobs = [ScoreJob(fresh.tokens(*ITEMS[0]), detector.probe, shadows=(a_shadow(detector, 4, "two"),))]
    fresh.score_ids(jobs)
    heads = detector.probe.heads
    assert asked == [{**heads, 4: tuple(range(8))}]
    assert sum(map(len, heads.values())) < 6 * 8 - len(heads.get(4, ()))  # or all would be the same


@pytest.mark.parametrize(
    ("error", "told"), [(ProbeMismatch("other"), "other"), (ZeroDivisionError("x"), "ZeroDivision")]
)
def test_a_shadow_that_fails_costs_only_its_own_verdict(
    detector: Detector, error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = a_shadow(detector, 5, "bad"), a_shadow(detector, 2, "good")
    score = Probe.score_read

    def failing(probe: Probe, *args: object) -> object:
        if probe is bad:
            raise error
        return score(probe, *args)

    monkeypatch.setattr(Probe, "score_read", failing)
    job = ScoreJob(detector.tokens(*ITEMS[0]), detector.probe, shadows=(bad, good))
    [scored] = detector.score_ids([job])
    assert scored.detection.logit is not None
    assert isinstance(scored.shadows[0], DetectorError)
    assert told in str(scored.shadows[0])
    assert scored.shadows[1].probe_name == "good"
    with pytest.raises(type(error)):
        detector.score_ids([ScoreJob(job.ids, bad)])


def test_a_probe_that_reads_no_head_beside_one_that_does(detector: Detector) -> None:
    none = replace(detector.probe, selected=np.zeros((6, 8), bool), weights=np.zeros_like(detector.probe.weights))
    ids = detector.tokens(*ITEMS[0])
    for jobs in ([ScoreJob(ids, none, shadows=(detector.probe,))], [ScoreJob(ids, none)]):
        [scored] = detector.score_ids(jobs)
        assert scored.detection.logit == none.bias


def test_logits_that_are_not_finite_are_said_where_they_are_read(detector: Detector) -> None:
    both = replace(detector.probe, statistic_weights={"mean_log_probability.v1": 1.0})
    ids = detector.tokens(*ITEMS[0])
    hook = detector.model.lm_head.register_forward_hook(lambda _, inputs, output: output * torch.nan)
    try:
        [scored] = detector.score_ids([ScoreJob(ids, detector.probe, shadows=(both,))])
    finally:
        hook.remove()
    assert scored.detection.logit is not None
    assert scored.shadows[0].logit is None
    assert scored.shadows[0].reason is Reason.NON_FINITE


def test_a_probe_of_another_model_is_refused_before_it_scores(detector: Detector) -> None:
    detector.require(detector.probe)
    with pytest.raises(ProbeMismatch):
        detector.require(replace(detector.probe, identity=random_identity()))


def test_the_same_capture_serves_every_score(detector: Detector) -> None:
    first = detector.language_model.capture({0: (1,)})
    detector.score(*ITEMS[0])
    assert detector.language_model.capture({0: (1,)}) is first
    for head in range(40):
        detector.language_model.capture({head % 6: tuple(range(1 + head % 7))})
    assert detector.language_model.capture({0: (1,)}) is not first  # not all are kept for ever
