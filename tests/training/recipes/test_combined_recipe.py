"""Attention and log-probabilities in one linear map: it knows more than either of them, and says what it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from training_fakes import LAPLACIAN, make_table, statistics_of, write_store
from typer.testing import CliRunner

from lapwing_detector.probe import Probe
from lapwing_detector.token_statistics import TOKEN_STATISTICS
from lapwing_training.cli import train as cli_train
from lapwing_training.errors import InvalidOption
from lapwing_training.evaluation import baselines
from lapwing_training.evaluation.nested import fit
from lapwing_training.evaluation.transfer import evaluate_probe
from lapwing_training.probe.train import TrainOptions, train_probe
from lapwing_training.recipes.fit import LapwingRecipe, make_recipe
from lapwing_training.recipes.lapwing import FREEDOM
from lapwing_training.report import transfer_report
from lapwing_training.store.store import read_store
from lapwing_training.store.table import Table

STATISTICS = tuple(TOKEN_STATISTICS)
OPTIONS = TrainOptions(recipe="combined", features=(LAPLACIAN,), k=2, heads=2, resamples=40)
GIVEN = LapwingRecipe((LAPLACIAN,), 2, heads=np.array([2, 9]), strength=0.1, statistics=STATISTICS)


def rows(count: int = 400, **more: object) -> Table:
    return make_table(rows=count, planted=(2, 9), strength=0.6, said=True, **more)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHUFFLES", "RANDOM_DRAWS", "NESTED_DRAWS"):
        monkeypatch.setattr(baselines, name, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "store", rows(per_group=2, stages=(0.5,)))


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SHUFFLES", "RANDOM_DRAWS", "NESTED_DRAWS"):
            patch.setattr(baselines, name, 2)
        out = tmp_path_factory.mktemp("probes") / "combined"
        train_probe(store, out, OPTIONS)
    return out


def test_it_is_one_regression_on_both_folded_into_plain_values() -> None:
    table = rows()
    found = GIVEN.fit(table, 0)
    heads = table.of_heads((LAPLACIAN,), 2, np.array([2, 9])).astype(np.float64)
    spread = heads.std(axis=0)
    heads = ((heads - heads.mean(axis=0)) / np.sqrt(spread * spread.sum(axis=-1, keepdims=True))).reshape(400, -1)
    said = (table.token_statistics - table.token_statistics.mean(axis=0)) / table.token_statistics.std(axis=0)
    columns = np.concatenate([FREEDOM * said, heads], axis=1)
    model = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-8, max_iter=5000).fit(columns, table.labels)
    raw = found.logit(table) * found.chosen["logit_scale"] + found.chosen["logit_centre"]
    np.testing.assert_allclose(raw, model.decision_function(columns), atol=2e-3)  # columns are float32
    assert tuple(found.statistic_weights) == STATISTICS
    logits = found.logit(table)
    assert (logits.mean(), logits.std()) == pytest.approx((0.0, 1.0), abs=1e-6)


def test_it_knows_more_than_attention_and_more_than_log_probabilities_alone() -> None:
    table, fresh = rows(600), rows(2000, seed=1)
    both, attention = GIVEN.fit(table, 0), replace(GIVEN, statistics=()).fit(table, 0)
    alone = LogisticRegression().fit(table.token_statistics, table.labels).decision_function(fresh.token_statistics)
    scores = [roc_auc_score(fresh.labels, one) for one in (both.logit(fresh), attention.logit(fresh), alone)]
    assert scores[0] > max(scores[1:]) + 0.02
    # Control: statistics that know nothing add nothing.
    order = np.random.default_rng(0).permutation(600)
    dealt = replace(table, token_statistics=table.token_statistics[order])
    assert roc_auc_score(fresh.labels, GIVEN.fit(dealt, 0).logit(fresh)) < scores[1] + 0.01


def test_the_penalty_leaves_the_statistics_their_weight() -> None:
    table = rows()
    strict, loose = (replace(GIVEN, strength=strength).fit(table, 0) for strength in (0.001, 10.0))
    # As shares of the spread of the logits: those of the heads shrink, those of the statistics do not.
    parts = [
        (table.statistics(STATISTICS) @ np.array(list(one.statistic_weights.values()))).std() for one in (strict, loose)
    ]
    assert parts[0] > parts[1]
    assert parts[0] > 0.5


def test_everything_is_chosen_with_the_statistics_in_and_tested_rows_do_not_matter() -> None:
    table = rows()
    recipe = LapwingRecipe((LAPLACIAN,), None, statistics=STATISTICS)
    found = fit(table, recipe, 0)
    assert found.probe.chosen["heads"] <= 16
    changed = table.token_statistics.copy()
    _, tested = found.folds[0]
    changed[tested] *= -3.0
    again = fit(replace(table, token_statistics=changed), recipe, 0)
    np.testing.assert_array_equal(again.fold_probes[0].weights, found.fold_probes[0].weights)
    assert again.fold_probes[0].statistic_weights == found.fold_probes[0].statistic_weights
    assert again.fold_probes[1].statistic_weights != found.fold_probes[1].statistic_weights


def test_the_saved_probe_scores_as_the_table_says_and_is_compared_with_what_it_must_beat(
    trained: Path, store: Path
) -> None:
    probe, table = Probe.from_pretrained(trained), read_store(store).table
    assert probe.reads_log_probabilities
    logits = probe.logit(table.stacked(probe.features, probe.k), table.token_statistics)
    result = evaluate_probe(trained, store, resamples=10, seen_groups=True)
    assert result["test"]["auroc"]["value"] == pytest.approx(roc_auc_score(table.labels, logits))
    metrics = probe.metrics
    assert metrics["probe"] == f"combined/{LAPLACIAN}"
    assert metrics["comparison"][metrics["probe"]]["auroc"] == metrics["test"]["auroc"]
    assert {f"lapwing/{LAPLACIAN}", "token_statistics", "log_probability", "random_heads"} <= set(metrics["comparison"])
    assert "log_probability+attention" not in metrics["comparison"]
    alone = metrics["comparison"]["token_statistics"]["auroc"]["value"]
    assert metrics["paired"]["difference"]["value"] == pytest.approx(metrics["test"]["auroc"]["value"] - alone)
    # As many heads by lot, with the statistics beside them, know more than nothing.
    assert metrics["comparison"]["random_heads"]["auroc"]["value"] > alone - 0.05


def test_a_part_of_the_response_is_judged_by_the_log_probabilities_of_that_part(trained: Path) -> None:
    half, whole = Probe.from_pretrained(trained).metrics["stages"]
    assert (half["fraction"], whole["fraction"]) == (0.5, 1.0)
    assert half["auroc"]["value"] < whole["auroc"]["value"]


def test_card_report_page_and_notes_say_that_it_reads_more_than_attention(trained: Path) -> None:
    for name in ("README.md", "report.md", "report.html"):
        text = (trained / name).read_text(encoding="utf-8")
        assert "reads more than attention" in text, name
    report = (trained / "report.md").read_text(encoding="utf-8")
    assert "combined: Laplacian eigenvalues + log-probabilities (this probe)" in report
    assert "Attention added to log-probability statistics alone changes the AUROC by" in report
    assert "weight of mean log-probability" in report
    assert "more than attention" in " ".join(Probe.from_pretrained(trained).metrics["notes"])
    assert "lapwing train store --out combined --recipe combined --selection fdr" in report


def test_a_store_without_log_probabilities_is_refused_before_anything_is_fitted(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_store(tmp_path / "old", make_table(rows=200, planted=(2,)))
    monkeypatch.setattr(LapwingRecipe, "fit", None)
    for act in (
        lambda: train_probe(old, tmp_path / "probe", OPTIONS),
        lambda: evaluate_probe(trained, old, seen_groups=True),
    ):
        with pytest.raises(InvalidOption, match=r"holds no log-probabilities .* lapwing extract .* generate --store"):
            act()
    app = typer.Typer()
    app.command()(cli_train.train)
    said = CliRunner().invoke(app, [str(old), "--out", str(tmp_path / "probe"), "--recipe", "combined"])
    assert (said.exit_code, said.stdout) == (2, "")
    assert "log-probabilities" in said.stderr


def test_other_recipes_pass_them_over_but_are_held_against_them(store: Path, tmp_path: Path) -> None:
    probe = train_probe(store, tmp_path / "plain", replace(OPTIONS, recipe="lapwing"))
    assert not probe.reads_log_probabilities
    assert "token_statistics" in probe.metrics["comparison"]
    assert "combination" in probe.metrics["paired"]
    difference = (
        probe.metrics["test"]["auroc"]["value"] - probe.metrics["comparison"]["token_statistics"]["auroc"]["value"]
    )
    assert probe.metrics["against_statistics"]["difference"]["value"] == pytest.approx(difference)
    report = (tmp_path / "plain" / "report.md").read_text(encoding="utf-8")
    assert "Its AUROC less that of log-probability statistics alone is" in report
    assert "more than attention" not in report


def test_a_transfer_is_judged_and_told_like_any_other(trained: Path, tmp_path: Path) -> None:
    fresh = rows(seed=9)
    fresh = replace(fresh, groups=np.char.add("n", fresh.groups))
    result = evaluate_probe(trained, write_store(tmp_path / "fresh", fresh), resamples=40)
    assert result["test"]["auroc"]["low"] > 0.6
    assert "log_probability+attention" not in result["comparison"]
    assert [one["statistic"] for one in result["drift"]["statistics"]] == list(STATISTICS)
    assert min(one["p_value"] for one in result["drift"]["statistics"]) > 1e-3
    assert "lowest log-odds: median" in transfer_report(result)
    # Control: a model that is surer of everything is not the same.
    surer = replace(fresh, log_probabilities=0.2 * fresh.log_probabilities)
    surer = replace(surer, token_statistics=statistics_of(surer, np.arange(400), surer.response_tokens))
    moved = evaluate_probe(trained, write_store(tmp_path / "surer", surer), resamples=5)["drift"]["statistics"]
    assert max(one["p_value"] for one in moved) < 1e-6


def test_it_ranks_heads_as_lapwing_does() -> None:
    recipe = make_recipe("combined", None, None, 10, "l1", 5)
    assert (recipe.name, recipe.selection, recipe.count) == ("combined", "l1", 5)
    table = rows()
    plain = replace(GIVEN, heads=None, count=3)
    both = plain.fit(table, 0)
    np.testing.assert_array_equal(both.selected, replace(plain, statistics=()).fit(table, 0).selected)
