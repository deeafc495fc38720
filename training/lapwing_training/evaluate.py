"""How good a probe is, beside everything it must beat. The result is one mapping of JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from lapwing_training import baselines
from lapwing_training.calibrate import OperatingPoint, flagged_share
from lapwing_training.errors import NotEnoughData
from lapwing_training.fit import LapwingRecipe, LinearProbe, Recipe
from lapwing_training.metrics import estimate
from lapwing_training.progress import Advance, silent
from lapwing_training.sample import Sample, mean_over
from lapwing_training.significance import Floats, HeadSignificance
from lapwing_training.splits import Fold
from lapwing_training.table import Table


@dataclass(frozen=True)
class Fitted:
    """All that training has found before anything is judged."""

    recipe: Recipe
    probe: LinearProbe
    held_out: Floats
    """(training rows,) out-of-fold logits."""

    slope: float
    intercept: float
    points: tuple[OperatingPoint, ...]
    significance: Mapping[str, HeadSignificance]
    """By feature, of the training rows."""


def evaluate_fit(
    fitted: Fitted, table: Table, split: Fold, resamples: int, seed: int, advance: Advance = silent
) -> dict[str, Any]:
    """Metrics of a fresh fit on the rows that it never saw, with baselines, comparisons and controls.

    Args:
        fitted: the probe and what belongs to it.
        table: all labelled rows.
        split: training and test rows.
        resamples: of the group bootstrap.
        seed: of resamples, random heads and shuffled labels.
        advance: called `evaluation_steps` times.
    """
    train, test = table.take(split[0]), table.take(split[1])
    sample = Sample.of(test, resamples, seed)
    logits = fitted.probe.logit(test)
    signs = baselines.directions(train)
    combination = None
    if "log_probability" in signs:
        known = baselines.raw_scores(train)["log_probability"]
        combination = baselines.Combination.fit(known, fitted.held_out, train)
    probabilities = expit(fitted.slope * logits + fitted.intercept)
    result = judge_scores(sample, test, logits, probabilities, fitted.points, signs, combination, advance)
    comparison = result["comparison"]
    for name, recipe in baselines.comparisons(fitted.recipe, table).items():
        known_logits = logits if recipe is fitted.recipe else recipe.fit(train, seed).logit(test)
        comparison[name] = {"kind": "probe", **sample.judge(known_logits)}
        advance()
    result["probe"] = baselines.name_of(fitted.recipe)
    result["absent"] = {}
    try:
        comparison["shuffled_labels"] = _shuffled_control(fitted, table, split, sample, seed, advance)
    except NotEnoughData as error:  # the fit itself is good all the same
        result["absent"]["shuffled_labels"] = str(error)
    if isinstance(fitted.recipe, LapwingRecipe):
        comparison.update(_head_controls(fitted, train, test, sample, seed, advance))
    held_out = Sample.of(train, resamples, seed)
    result["out_of_fold"] = {
        **held_out.about(),
        **held_out.judge(fitted.held_out),
        **held_out.calibration(expit(fitted.slope * fitted.held_out + fitted.intercept)),
    }
    advance()
    result["significance"] = {
        name: {"heads": tested.p_value.size, "share_p": tested.share_p, "share_q": tested.share_q}
        for name, tested in fitted.significance.items()
    }
    return result


def judge_scores(
    sample: Sample,
    table: Table,
    logits: Floats,
    probabilities: Floats,
    points: Sequence[OperatingPoint],
    signs: Mapping[str, float],
    combination: baselines.Combination | None,
    advance: Advance = silent,
) -> dict[str, Any]:
    """What can be said of given logits on given rows: metrics, thresholds, strata, baselines.

    Args:
        sample: the rows, with their resamples.
        table: the same rows.
        logits: (rows,)
        probabilities: (rows,) calibrated.
        points: operating points to be checked.
        signs: direction of each baseline.
        combination: log-probability and attention; None when there are no log-probabilities.
        advance: called `judging_steps` times.
    """
    result: dict[str, Any] = {
        "test": {**sample.about(), **sample.judge(logits), **sample.calibration(probabilities)},
        "strata": sample.about_strata(),
        "thresholds": [_realised(point, logits, table) for point in points],
        "baseline_directions": dict(signs),
        "log_probability_missing": int((~np.isfinite(table.log_probabilities)).sum()),
    }
    scores = {name: signs[name] * values for name, values in baselines.raw_scores(table).items() if name in signs}
    advance()
    comparison: dict[str, Any] = {}
    for name, values in scores.items():
        comparison[name] = {"kind": "baseline", **sample.judge(values)}
        advance()
    if combination is not None and "log_probability" in scores:
        log_probabilities = scores["log_probability"] * signs["log_probability"]
        both = combination.score(log_probabilities, logits)
        comparison["log_probability+attention"] = {"kind": "combination", **sample.judge(both)}
        result["paired"] = _paired(sample, both, scores["log_probability"]) | {"combination": combination.to_dict()}
    advance()
    result["comparison"] = comparison
    return result


def judging_steps(table: Table) -> int:
    """How often `judge_scores` advances: the logits, each baseline, and the combination."""
    return len(baselines.raw_scores(table)) + 2


def evaluation_steps(recipe: Recipe, table: Table) -> int:
    """How often `evaluate_fit` advances: judging, a fit for each comparison and control, the out-of-fold logits."""
    fits = len(baselines.comparisons(recipe, table)) + baselines.SHUFFLES
    if isinstance(recipe, LapwingRecipe):
        fits += baselines.RANDOM_DRAWS + 1
    return judging_steps(table) + fits + 1


def _paired(sample: Sample, both: Floats, alone: Floats) -> dict[str, Any]:
    """AUROC of log-probability + attention less that of log-probability alone, in the same resamples."""
    paired: dict[str, Any] = {"difference": estimate(sample.auroc(both) - sample.auroc(alone))}
    labels = sample.labels[None]
    first, second = sample.within(both[None], labels), sample.within(alone[None], labels)
    if first:
        paired["difference_within"] = estimate(mean_over({name: first[name] - second[name] for name in first}))
    return paired


def _shuffled_control(
    fitted: Fitted, table: Table, split: Fold, sample: Sample, seed: int, advance: Advance
) -> dict[str, Any]:
    deals = baselines.shuffled_control(fitted.recipe, table, split, seed, advance)
    logits, labels = np.stack([logit for _, logit in deals]), np.stack([dealt.labels for dealt, _ in deals])
    return {"kind": "control", "draws": len(deals), **sample.judge(logits, labels)}


def _head_controls(
    fitted: Fitted, train: Table, test: Table, sample: Sample, seed: int, advance: Advance
) -> dict[str, dict[str, Any]]:
    by_lot = baselines.random_head_scores(fitted.probe, train, test, seed, advance)
    whole = baselines.all_heads(fitted.probe, train.shape).fit(train, seed).logit(test)
    advance()
    return {
        "random_heads": {"kind": "control", "draws": len(by_lot), **sample.judge(by_lot)},
        "all_heads": {"kind": "control", **sample.judge(whole)},
    }


def _realised(point: OperatingPoint, logits: Floats, table: Table) -> dict[str, Any]:
    """The promise of an operating point beside what came of it."""
    entry: dict[str, Any] = {
        "false_positive_rate": point.false_positive_rate,
        "logit": point.logit,
        "negatives": point.negatives,
        "reason": point.reason,
        "realised_rate": None,
        "found": None,
    }
    if point.logit is not None:
        entry["realised_rate"] = flagged_share(logits[table.labels == 0], point.logit)
        entry["found"] = flagged_share(logits[table.labels == 1], point.logit)
    return entry
