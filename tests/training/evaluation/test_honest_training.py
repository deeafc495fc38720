"""Whatever is set for rows to come is set on logits of rows that the fit did not see, and is what the files say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from training_fakes import LAPLACIAN, SCORE, make_table, write_store

from lapwing_detector.probe import Probe
from lapwing_training.errors import NotEnoughData
from lapwing_training.evaluation import evaluate as evaluate_module
from lapwing_training.evaluation.baselines import Combination, comparisons, name_of, raw_scores, shuffled_control
from lapwing_training.evaluation.calibrate import operating_points, platt
from lapwing_training.evaluation.evaluate import evaluate_fit
from lapwing_training.evaluation.nested import fit, trial_of
from lapwing_training.evaluation.plan import Plan
from lapwing_training.probe.train import TrainOptions, train_probe
from lapwing_training.recipes.fit import LapwingRecipe, LinearProbe, PaperRecipe
from lapwing_training.statistics.metrics import bootstrap_weights
from lapwing_training.statistics.significance import head_scalars, head_significance
from lapwing_training.statistics.splits import split_by_group
from lapwing_training.store.store import read_store
from lapwing_training.store.table import Table

FAST = TrainOptions(features=(LAPLACIAN,), k=4, resamples=60, test_share=0.2)
RECIPE = LapwingRecipe((LAPLACIAN,), 4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = make_table(rows=500, planted=(2, 9), strength=0.8, per_group=2, seed=5)
    return write_store(tmp_path_factory.mktemp("stores") / "store", table)


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probes") / "probe"
    train_probe(store, out, FAST)
    return out


def told(trained: Path, fold: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of predictions.jsonl, in its order."""
    rows = [json.loads(line) for line in (trained / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if row["fold"] == fold]
    return np.array([row["logit"] for row in kept]), np.array([row["label"] for row in kept])


def sides(store: Path) -> tuple[Table, Table]:
    table = read_store(store).table
    rows, tested = split_by_group(table, FAST.test_share, FAST.seed)
    return table.take(rows), table.take(tested)


def realised_rates(recipe: LapwingRecipe, seeds: int = 8) -> np.ndarray:
    """What becomes of a promise of 10 % on thousands of fresh rows, for probes of a few hundred rows each."""
    rates = []
    for seed in range(seeds):
        table = make_table(rows=4400, planted=(1, 5, 9, 14), strength=0.3, seed=seed)
        fitted, fresh = fit(table.take(np.arange(400)), recipe, seed), table.take(np.arange(400, 4400))
        rates.append((fitted.probe.logit(fresh)[fresh.labels == 0] > fitted.points[2].logit).mean())
    return np.array(rates)


def test_a_promised_rate_is_about_kept_by_the_whole_fit() -> None:
    rates = realised_rates(RECIPE)
    # The 216th of 240 negatives alone scatters by .02, the probe's own luck by as much again.
    assert abs(rates.mean() - 0.1) < 0.025
    assert rates.min() > 0.04
    assert rates.max() < 0.18
    assert np.abs(rates - 0.1).mean() < 0.025


def test_control_logits_that_are_as_long_as_their_c_allows_break_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearProbe, "on_unit_scale", lambda probe, table: probe)
    assert np.abs(realised_rates(RECIPE) - 0.1).mean() > 0.05  # mostly far too small


def test_thresholds_and_calibration_are_set_on_the_out_of_fold_logits_of_the_file(trained: Path) -> None:
    probe = Probe.from_pretrained(trained)
    logits, labels = told(trained, "out-of-fold")
    negatives = np.sort(logits[labels == 0])
    for point in probe.thresholds:
        rank = math.ceil(round((len(negatives) + 1) * (1 - point.false_positive_rate), 9))
        assert point.logit == negatives[rank - 1]
    slope, intercept = platt(logits, labels)
    assert (probe.calibration.slope, probe.calibration.intercept) == pytest.approx((slope, intercept))


def test_realised_rates_are_counted_on_the_test_rows_of_the_file(trained: Path) -> None:
    probe = Probe.from_pretrained(trained)
    logits, labels = told(trained, "test")
    for point, entry in zip(probe.thresholds, probe.metrics["thresholds"][-len(probe.thresholds) :], strict=True):
        assert point.realised_rate == pytest.approx((logits[labels == 0] > point.logit).mean())
        assert entry["found"] == pytest.approx((logits[labels == 1] > point.logit).mean())
    assert any(point.realised_rate != point.false_positive_rate for point in probe.thresholds)


def test_on_noise_the_probabilities_say_nothing() -> None:
    slopes, thresholds = [], []
    for seed in range(6):
        table = make_table(rows=240, layers=8, heads=8, seed=seed)
        fitted = fit(table, replace(RECIPE, heads=np.arange(64), strength=0.1), seed)
        inside = fitted.probe.logit(table)
        slopes.append((fitted.calibration.slope, platt(inside, table.labels)[0]))
        thresholds.append((fitted.points[2].logit, operating_points(inside[table.labels == 0])[2].logit))
    (slope, in_sample), (threshold, in_sample_threshold) = np.mean(slopes, axis=0), np.mean(thresholds, axis=0)
    assert slope < 0.2
    assert in_sample > 1.0  # control: on the rows of the fit
    assert threshold > in_sample_threshold + 0.3


def test_the_combination_is_fitted_on_out_of_fold_logits(trained: Path, store: Path) -> None:
    train, _ = sides(store)
    known = raw_scores(train)["log_probability"]
    logits, _ = told(trained, "out-of-fold")
    found = Probe.from_pretrained(trained).metrics["paired"]["combination"]
    assert found["weights"] == pytest.approx(Combination.fit(known, logits, train).to_dict()["weights"])
    inside = fit(train, RECIPE, FAST.seed).probe.logit(train)
    assert found["weights"] != pytest.approx(Combination.fit(known, inside, train).to_dict()["weights"], rel=1e-2)


def test_the_paired_interval_is_that_of_the_differences_in_the_same_resamples(trained: Path, store: Path) -> None:
    metrics = Probe.from_pretrained(trained).metrics
    _, test = sides(store)
    combination = Combination.from_dict(metrics["paired"]["combination"])
    alone, labels = test.log_probabilities, test.labels
    both = combination.score(alone, told(trained, "test")[0])
    weights = bootstrap_weights(test.groups, FAST.resamples, FAST.seed)
    first, second = (
        np.array([roc_auc_score(labels, scores, sample_weight=weight) for weight in weights])
        for scores in (both, -alone)
    )
    found, expected = metrics["paired"]["difference"], first - second
    assert found["value"] == pytest.approx(expected[0])
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(expected[1:], [0.025, 0.975]))
    # Control: with resamples of their own the interval is wider.
    unpaired = np.quantile(first[1:] - np.roll(second[1:], 1), [0.025, 0.975])
    assert unpaired[1] - unpaired[0] > 1.2 * (found["high"] - found["low"])


def test_directions_of_the_baselines_come_from_training_rows() -> None:
    table = make_table(rows=400, planted=(2,))
    split = split_by_group(table, 0.3, seed=0)
    sign = np.ones(400)
    sign[split[1]] = -1.0  # among test rows everything points the other way
    turned = replace(
        table,
        token_counts=(100 + 10 * sign * (2 * table.labels - 1)).astype(np.int64),
        log_probabilities=-2.0 - sign * table.labels,
    )
    fitted = fit(turned.take(split[0]), RECIPE, 0)
    found = evaluate_fit(fitted, trial_of(fitted, turned, Plan("split", *split, split[0][:0])), 20, 0)
    assert found["baseline_directions"]["token_count"] == 1.0
    assert found["baseline_directions"]["log_probability"] == -1.0
    for name in ("token_count", "log_probability"):
        assert found["comparison"][name]["auroc"]["value"] == 0.0


def test_the_numbers_of_this_probe_are_those_of_the_fitted_recipe(store: Path, tmp_path: Path) -> None:
    probe = train_probe(store, tmp_path / "paper", replace(FAST, recipe="paper", k=2))
    assert probe.k == 2
    assert probe.metrics["probe"] == f"paper/{LAPLACIAN}"
    assert probe.metrics["comparison"][probe.metrics["probe"]]["auroc"] == probe.metrics["test"]["auroc"]
    # Control: the paper's own choice of k is another probe.
    train, test = sides(store)
    other = PaperRecipe((LAPLACIAN,)).fit(train, FAST.seed)
    assert roc_auc_score(test.labels, other.logit(test)) != probe.metrics["test"]["auroc"]["value"]


@pytest.mark.parametrize("recipe", [RECIPE, LapwingRecipe((SCORE, LAPLACIAN), 2), PaperRecipe((LAPLACIAN,), 2)])
def test_the_probe_itself_is_compared_and_not_fitted_again(recipe: LapwingRecipe | PaperRecipe) -> None:
    found = comparisons(recipe, make_table(rows=20))
    assert found[name_of(recipe)] is recipe
    assert len(found) == 4


def test_maps_are_of_the_probes_own_k() -> None:
    table = make_table(rows=300, planted=(2,))
    found = fit(table, LapwingRecipe((LAPLACIAN,), 2), 0).significance
    values = table.features[LAPLACIAN]
    own, stored = (head_significance(head_scalars(values[..., :k]), table.labels, table.groups).p_value for k in (2, 4))
    np.testing.assert_array_equal(found[LAPLACIAN].p_value, own)
    assert (own != stored).any()  # control
    assert found[SCORE].p_value.shape == own.shape


def test_shuffled_labels_keep_both_classes_on_both_sides() -> None:
    table = make_table(rows=200, per_group=2)
    split = split_by_group(table, 0.3, seed=0)
    train, test = table.take(split[0]), table.take(split[1])
    fitted_on: list[Table] = []

    class Spy:
        name, features = "spy", (LAPLACIAN,)

        def fit(self, dealt, seed):
            fitted_on.append(dealt)
            return LinearProbe((LAPLACIAN,), 4, np.zeros((4, 4, 4), np.float32), 0.0, np.ones((4, 4), bool), {})

    deals = shuffled_control(Spy(), table, [split], seed=0)
    assert {int(dealt.labels.sum()) for dealt in fitted_on} == {int(train.labels.sum())}
    assert {int(dealt.labels.sum()) for dealt, _ in deals} == {int(test.labels.sum())}
    assert len({dealt.labels.tobytes() for dealt, _ in deals}) == len(deals)
    # Control: dealt over all rows, the sides' shares move.
    everywhere = [np.random.default_rng(seed).permutation(table.labels) for seed in range(5)]
    assert len({int(dealt[split[1]].sum()) for dealt in everywhere}) > 1


def test_a_control_that_can_not_be_fitted_is_absent_with_a_note(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(*arguments: object) -> None:
        raise NotEnoughData("4 groups with hallucinated rows; 5 folds need at least 5")

    monkeypatch.setattr(evaluate_module.baselines, "shuffled_control", scarce)
    probe = train_probe(store, tmp_path / "probe", FAST)
    assert "shuffled_labels" not in probe.metrics["comparison"]
    assert "No control with shuffled labels: 4 groups" in " ".join(probe.metrics["notes"])
    assert "shuffled labels: 4 groups" in (tmp_path / "probe" / "report.md").read_text(encoding="utf-8")


def test_single_draws_of_random_heads_are_reported(trained: Path) -> None:
    found = Probe.from_pretrained(trained).metrics["comparison"]["random_heads"]
    assert found["over_draws"]["lowest"] < found["auroc"]["value"] < found["over_draws"]["highest"]
    report = (trained / "report.md").read_text(encoding="utf-8")
    assert "random heads, same number: single AUROCs from ." in report
    heads = [line for line in report.splitlines() if line.startswith("| stratum")]
    assert "random heads" in " ".join(heads)


def test_progress_counts_every_step_to_the_end(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lapwing_training.evaluation.transfer import evaluate_probe

    for recipe, k, share in (("lapwing", None, 0.2), ("paper", 2, None), ("paper", None, 0.2)):
        options = replace(FAST, recipe=recipe, k=k, resamples=20, test_share=share)
        train_probe(store, tmp_path / recipe, options)
        bar = capsys.readouterr().err.rsplit("\r", 1)[-1]
        assert bar.startswith("train: 100%")
    evaluate_probe(tmp_path / "paper", store, resamples=20)
    assert capsys.readouterr().err.rsplit("\r", 1)[-1].startswith("evaluate: 100%")


def test_the_manifest_says_which_share_was_tested(tmp_path: Path) -> None:
    table = make_table(rows=400)
    given = replace(table, splits=np.where(np.arange(400) < 100, "test", "train"))
    probe = train_probe(write_store(tmp_path / "store", given), tmp_path / "probe", FAST)
    assert probe.training["test_share"] == 0.25
