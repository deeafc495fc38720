"""How far today's answers are from those of the probe's making: an index with an oracle, and samples it must tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from engine_fakes import a_probe
from scipy import stats

from lapwing_detector import embedded
from lapwing_detector.probe import Probe
from lapwing_server.drift import FEWEST, GROUPS, WINDOW, Drift, Reference

EDGES = [step / 20 for step in range(21)]
SHARES = stats.beta(2, 3)
COUNTS = (4000 * np.diff(SHARES.cdf(EDGES))).round().tolist()
LENGTHS = {"edges": [1, 5, 10, 20, 40, 80, 160, 400], "counts": [50, 100, 300, 400, 200, 60, 20]}
SCORES = {"edges": EDGES, "hallucinated": [count / 2 for count in COUNTS], "other": [count / 2 for count in COUNTS]}


def like(histogram: Mapping[str, Any], generator: np.random.Generator, count: int) -> Any:
    """Whole numbers from the bars of a histogram."""
    edges, counts = np.array(histogram["edges"]), np.array(histogram["counts"])
    bars = generator.choice(len(counts), count, p=counts / counts.sum())
    return generator.integers(np.ceil(edges[bars]), np.ceil(edges[bars + 1]))


def following(**metrics: Any) -> tuple[Drift, str]:
    """A drift that looks at a probe with these metrics, and the probe's revision."""
    probe = a_probe(metrics={"histogram": SCORES, "lengths": LENGTHS} | metrics)
    drift = Drift()
    drift.follow(probe)
    return drift, probe.revision


def values(drift: Drift) -> dict[str, float]:
    return {sample.name: sample.value for metric in drift.collect() for sample in metric.samples}


def fill(drift: Drift, revision: str, scores: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    for score, length in zip(scores, lengths, strict=True):
        drift.add(revision, float(score), int(length))
    return values(drift)


def test_the_groups_are_about_equally_full_and_hold_everything() -> None:
    reference = Reference.of(EDGES, COUNTS)
    assert reference is not None
    assert len(reference.shares) == GROUPS == len(reference.edges) + 1
    assert reference.shares.sum() == pytest.approx(1.0)
    # A bar of the training histogram holds at most 9 % here, so that no border is off by more than half of that.
    assert reference.shares.min() > 0.1 - 0.09
    assert reference.shares.max() < 0.1 + 0.09


def test_the_index_is_that_of_the_formula() -> None:
    reference = Reference.of(EDGES, COUNTS)
    assert reference is not None
    sample = np.random.default_rng(5).uniform(size=700)
    bars = np.histogram(sample, [-np.inf, *reference.edges, np.inf])[0] + 0.5
    now, then = (
        bars / bars.sum(),
        np.diff([0.0, *np.cumsum(COUNTS)[(reference.edges * 20).round().astype(int) - 1], sum(COUNTS)]),
    )
    then = then / then.sum()
    assert reference.index(sample) == pytest.approx(stats.entropy(now, then) + stats.entropy(then, now))


@pytest.mark.parametrize("count", [FEWEST, WINDOW])
def test_chance_alone_gives_what_the_help_says(count: int) -> None:
    """About (groups - 1) / responses: the index times the count follows chi-square."""
    reference = Reference.of(EDGES, COUNTS)
    assert reference is not None
    generator = np.random.default_rng(7)
    found = [count * reference.index(SHARES.rvs(count, random_state=generator)) for _ in range(300)]
    assert np.mean(found) == pytest.approx(GROUPS - 1, rel=0.15)
    assert np.quantile(found, 0.99) < 1.3 * stats.chi2(GROUPS - 1).ppf(0.99)


@pytest.mark.parametrize("seed", range(5))
def test_a_shifted_sample_exceeds_and_the_same_distribution_does_not(seed: int) -> None:
    generator = np.random.default_rng(seed)
    drift, revision = following()
    same = fill(drift, revision, SHARES.rvs(WINDOW, random_state=generator), like(LENGTHS, generator, WINDOW))
    assert same["lapwing_drift_responses"] == WINDOW
    assert same["lapwing_drift_score_index"] < 0.1
    assert same["lapwing_drift_length_index"] < 0.1
    moved = stats.beta(4, 3).rvs(WINDOW, random_state=generator)
    shifted = fill(drift, revision, moved, 3 * like(LENGTHS, generator, WINDOW))
    assert shifted["lapwing_drift_score_index"] > 0.25
    assert shifted["lapwing_drift_length_index"] > 0.25


def test_one_of_the_two_may_shift_alone() -> None:
    generator = np.random.default_rng(1)
    drift, revision = following()
    found = fill(drift, revision, SHARES.rvs(WINDOW, random_state=generator), [3] * WINDOW)
    assert found["lapwing_drift_score_index"] < 0.1
    assert found["lapwing_drift_length_index"] > 1.0


def test_there_is_no_value_before_there_are_enough_and_the_oldest_are_forgotten() -> None:
    drift, revision = following()
    found = fill(drift, revision, [0.99] * (FEWEST - 1), [7] * (FEWEST - 1))
    assert found == {"lapwing_drift_responses": FEWEST - 1}
    found = fill(drift, revision, [0.99], [7])
    assert set(found) == {"lapwing_drift_responses", "lapwing_drift_score_index", "lapwing_drift_length_index"}
    assert found["lapwing_drift_score_index"] > 1
    generator = np.random.default_rng(2)
    found = fill(drift, revision, SHARES.rvs(WINDOW, random_state=generator), [7] * WINDOW)
    assert found["lapwing_drift_responses"] == WINDOW
    assert found["lapwing_drift_score_index"] < 0.1, "the odd ones are out of the window"


def test_another_probe_begins_anew_and_the_same_one_does_not() -> None:
    drift, revision = following()
    fill(drift, revision, [0.5] * WINDOW, [7] * WINDOW)
    same = a_probe(metrics={"histogram": SCORES, "lengths": LENGTHS})
    drift.follow(same)
    assert values(drift)["lapwing_drift_responses"] == WINDOW
    other = a_probe(bias=0.5, metrics={"histogram": SCORES})
    assert other.revision != revision
    drift.follow(other)
    assert values(drift) == {"lapwing_drift_responses": 0}
    found = fill(drift, revision, [0.5] * WINDOW, [7] * WINDOW)
    assert found == {"lapwing_drift_responses": 0}, "answers that the old probe still gives are not compared"
    found = fill(drift, other.revision, [0.5] * WINDOW, [7] * WINDOW)
    assert set(found) == {"lapwing_drift_responses", "lapwing_drift_score_index"}, "it says nothing of lengths"


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        "x",
        {},
        {"edges": EDGES},
        {"edges": EDGES, "hallucinated": [1], "other": [1], "counts": [1]},
        {"edges": EDGES[::-1], "hallucinated": COUNTS, "other": COUNTS, "counts": COUNTS},
        {"edges": EDGES, "hallucinated": [0] * 20, "other": [0] * 20, "counts": [0] * 20},
        {"edges": EDGES, "hallucinated": [-1] * 20, "other": [0] * 20, "counts": [-1] * 20},
        {"edges": EDGES, "hallucinated": [float("nan")] * 20, "other": [0] * 20, "counts": [float("nan")] * 20},
        {"edges": [0, 1], "hallucinated": [5], "other": [5], "counts": [5]},
        {"edges": [0, 1, 2], "hallucinated": [5, 0], "other": [5, 0], "counts": [5, 0]},
        {"edges": ["a", "b", "c"], "hallucinated": [5, 0], "other": [5, 0], "counts": [5, 0]},
    ],
)
def test_metrics_that_say_nothing_give_no_value(broken: Any) -> None:
    """A probe of another tool may hold anything there; the server must not fail for it."""
    drift, revision = following(histogram=broken, lengths=broken)
    assert fill(drift, revision, [0.5] * WINDOW, [7] * WINDOW) == {"lapwing_drift_responses": WINDOW}


def test_the_embedded_probe_says_how_its_scores_and_lengths_were_distributed() -> None:
    probe = Probe.from_pretrained(embedded.probe_path())
    drift = Drift()
    drift.follow(probe)
    generator = np.random.default_rng(4)
    counts = np.add(probe.metrics["histogram"]["hallucinated"], probe.metrics["histogram"]["other"])
    bars = generator.choice(len(counts), WINDOW, p=counts / counts.sum())
    scores = (bars + generator.uniform(0.01, 0.99, WINDOW)) / len(counts)
    told = probe.metrics.get("lengths")  # a probe that was fitted before there were any says nothing of them
    lengths = like(told, generator, WINDOW) if told else np.full(WINDOW, 7)
    same = fill(drift, probe.revision, scores, lengths)
    assert same["lapwing_drift_score_index"] < 0.05
    assert ("lapwing_drift_length_index" in same) == bool(told)
    assert same.get("lapwing_drift_length_index", 0.0) < 0.05
    other = fill(drift, probe.revision, 1 - scores**2, 20 * lengths)
    assert other["lapwing_drift_score_index"] > 0.25
    assert other.get("lapwing_drift_length_index", 1.0) > 0.25
