"""Statistics of the log-probabilities stand beside every probe, on other stores, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from train_fakes import FAST
from training_fakes import make_table, statistics_of, write_store

from lapwing_detector import probe_files
from lapwing_detector.probe import Probe
from lapwing_training.evaluation import baselines
from lapwing_training.evaluation.statistics_alone import StatisticsAlone, held_out_scores
from lapwing_training.evaluation.transfer import evaluate_probe
from lapwing_training.probe import train as train_module
from lapwing_training.report import transfer_report
from lapwing_training.store.table import Table


def rows(count: int = 400, seed: int = 0) -> Table:
    return make_table(rows=count, planted=(2, 9), strength=0.6, said=True, seed=seed)


def elsewhere() -> Table:
    """As the other rows, of groups that no probe has seen."""
    fresh = rows(seed=9)
    return replace(fresh, groups=np.char.add("n", fresh.groups))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("probes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "html_report", lambda probe: "")
        patch.setattr(probe_files, "card_pictures", lambda probe: {})
        for name in ("SHUFFLES", "RANDOM_DRAWS", "NESTED_DRAWS"):
            patch.setattr(baselines, name, 2)
        train_module.train_probe(write_store(place / "store", rows()), place / "probe", FAST)
    return place / "probe"


def test_it_is_a_regression_on_standardised_statistics_folded_into_weights() -> None:
    table, fresh = rows(), rows(seed=1)
    found = StatisticsAlone.fit(table.token_statistics, table.labels)
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    expected = model.fit(table.token_statistics, table.labels).decision_function(fresh.token_statistics)
    np.testing.assert_allclose(found.score(fresh.token_statistics), expected, rtol=1e-9, atol=1e-9)
    again = StatisticsAlone.from_dict(found.to_dict())
    np.testing.assert_array_equal(again.score(fresh.token_statistics), found.score(fresh.token_statistics))


def test_no_row_is_scored_by_what_saw_it() -> None:
    table = rows(80)
    folds = [(np.arange(40), np.arange(40, 80)), (np.arange(40, 80), np.arange(40))]
    before = held_out_scores(table, folds)
    turned = held_out_scores(table.with_labels(np.where(np.arange(80) < 40, 1 - table.labels, table.labels)), folds)
    np.testing.assert_array_equal(turned[:40], before[:40])
    assert not np.array_equal(turned[40:], before[40:])  # control: those were fitted on the labels that were turned
    assert held_out_scores(replace(table, token_statistics=None), folds) is None


def test_on_another_store_they_stand_beside_the_probe_with_the_difference(trained: Path, tmp_path: Path) -> None:
    fresh = elsewhere()
    result = evaluate_probe(trained, write_store(tmp_path / "fresh", fresh), resamples=40)
    kept = StatisticsAlone.from_dict(Probe.from_pretrained(trained).metrics["statistics_alone"])
    alone = result["comparison"]["token_statistics"]["auroc"]
    assert alone["value"] == pytest.approx(roc_auc_score(fresh.labels, kept.score(fresh.token_statistics)))
    assert alone["low"] > 0.5
    difference = result["against_statistics"]["difference"]
    assert difference["value"] == pytest.approx(result["test"]["auroc"]["value"] - alone["value"])
    assert difference["low"] < difference["value"] < difference["high"]
    told = transfer_report(result)
    assert "| log-probability statistics alone |" in told
    assert "Its AUROC less that of log-probability statistics alone is" in told


def test_control_log_probabilities_of_others_answers_know_nothing(trained: Path, tmp_path: Path) -> None:
    fresh = elsewhere()
    dealt = replace(fresh, log_probabilities=np.random.default_rng(1).permutation(fresh.log_probabilities))
    dealt = replace(dealt, token_statistics=statistics_of(dealt, np.arange(400), dealt.response_tokens))
    result = evaluate_probe(trained, write_store(tmp_path / "dealt", dealt), resamples=40)
    alone = result["comparison"]["token_statistics"]["auroc"]
    assert alone["low"] < 0.5 < alone["high"]
    assert result["against_statistics"]["difference"]["low"] > 0


def test_a_store_without_them_has_no_such_row(trained: Path, tmp_path: Path) -> None:
    silent = replace(elsewhere(), token_statistics=None)
    result = evaluate_probe(trained, write_store(tmp_path / "silent", silent), resamples=5)
    assert "token_statistics" not in result["comparison"]
    assert "against_statistics" not in result
    assert "statistics alone" not in transfer_report(result)
