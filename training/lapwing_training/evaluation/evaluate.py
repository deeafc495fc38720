"""How good a probe is, beside everything it must beat. The result is one mapping of JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lapwing_training.errors import NotEnoughData
from lapwing_training.evaluation import baselines
from lapwing_training.evaluation.calibrate import choose_kind
from lapwing_training.evaluation.curve import learning_curve
from lapwing_training.evaluation.guarantee import guarantee
from lapwing_training.evaluation.nested import Fitted, Trial, joined, logits_over
from lapwing_training.evaluation.plan import Plan
from lapwing_training.evaluation.sample import Sample
from lapwing_training.evaluation.scores import Scores, judge_scores, judging_steps, realised
from lapwing_training.evaluation.stages import judge_stages
from lapwing_training.evaluation.statistics_alone import StatisticsAlone, beside_statistics, held_out_scores
from lapwing_training.options import LAPLACIAN
from lapwing_training.progress import Advance, silent
from lapwing_training.recipes.fit import LapwingRecipe, Recipe
from lapwing_training.statistics.metrics import estimate
from lapwing_training.statistics.significance import Floats
from lapwing_training.statistics.splits import Rows
from lapwing_training.statistics.stability import RESAMPLES as STABILITY_RESAMPLES
from lapwing_training.store.table import Table

PAPER = f"paper/{LAPLACIAN}"
"""The published probe, by its name in the comparison."""


def evaluate_fit(fitted: Fitted, trial: Trial, resamples: int, seed: int, advance: Advance = silent) -> dict[str, Any]:
    """Metrics of a fresh fit on rows that it never saw, with baselines, comparisons and controls.

    Args:
        fitted: the probe and what belongs to it.
        trial: the rows that are judged, with their held-out scores.
        resamples: of the group bootstrap.
        seed: of resamples, random heads and shuffled labels.
        advance: called `evaluation_steps` times.
    """
    sample = Sample.of(trial.tested, resamples, seed)
    scores, about_baselines = _scores(fitted, trial)
    result = judge_scores(sample, trial.tested, scores, advance)
    result |= {"protocol": trial.plan.protocol, "probe": baselines.name_of(fitted.recipe), "absent": {}}
    result["baseline_directions"] = about_baselines["directions"]
    if "combination" in about_baselines:
        result["paired"]["combination"] = about_baselines["combination"]
    _beside_statistics(fitted, trial, sample, result)
    result["thresholds"] = realised(sample, fitted.points, trial.limits(trial.points), trial.logits)
    result["guarantee"] = guarantee(fitted, trial, sample, seed)
    result["comparison"] |= _probes(fitted, trial, sample, seed, result, advance)
    try:
        result["comparison"]["shuffled_labels"] = _shuffled_control(fitted, trial, sample, seed, advance)
    except NotEnoughData as error:  # the fit itself is good all the same
        result["absent"]["shuffled_labels"] = str(error)
    if isinstance(fitted.recipe, LapwingRecipe):
        result["comparison"] |= _head_controls(trial, sample, seed, advance)
        result["curve"] = _curve(fitted.recipe, trial, sample, seed, advance)
    if fitted.probe.frequency is not None:
        result["stability"] = {"resamples": STABILITY_RESAMPLES, "frequency": fitted.probe.frequency.tolist()}
    result["out_of_fold"] = _out_of_fold(fitted, trial, resamples, seed)
    advance()
    result["stages"] = judge_stages(trial, sample)
    advance()
    kind, reason = choose_kind(fitted.held_out, *_labels_and_groups(trial))
    result["calibration"] = {"kind": kind, "reason": reason}
    result["significance"] = {
        name: {"heads": tested.p_value.size, "share_p": tested.share_p, "share_q": tested.share_q}
        for name, tested in fitted.significance.items()
    }
    return result


def evaluation_steps(recipe: Recipe, table: Table, plan: Plan) -> int:
    """How often `evaluate_fit` advances: judging, a fit for each comparison and control in each fold, the rest."""
    fits = len(baselines.comparisons(recipe, table)) - 1 + _draws(plan, baselines.SHUFFLES)
    if isinstance(recipe, LapwingRecipe):
        fits += _draws(plan, baselines.RANDOM_DRAWS) + 2  # all heads, the curve
    return judging_steps(table, plan.fitted) + fits * plan.folds + 2


def _scores(fitted: Fitted, trial: Trial) -> tuple[Scores, dict[str, Any]]:
    """Held-out scores of the judged rows; and directions and combination of all fitted rows, for other stores.

    What a baseline must be told (its direction, its weight beside attention) every fold tells it anew.
    """
    table, raw = trial.table, baselines.raw_scores(trial.table, trial.plan.fitted)
    signs = [baselines.directions(raw, table.labels, known) for known, _ in trial.folds]
    oriented = {name: trial.spread([sign[name] for sign in signs]) * values[trial.rows] for name, values in raw.items()}
    about: dict[str, Any] = {"directions": baselines.directions(raw, table.labels, trial.plan.fitted)}
    both = None
    # A probe that reads log-probabilities by itself is a combination already.
    if "log_probability" in raw and not fitted.probe.statistic_weights:
        both = combined(trial, raw["log_probability"])
        about["combination"] = _combination(raw["log_probability"], trial.held_out, table, trial.plan.fitted).to_dict()
    return Scores(trial.logits, trial.probabilities, oriented, both), about


def _beside_statistics(fitted: Fitted, trial: Trial, sample: Sample, result: dict[str, Any]) -> None:
    """Adds statistics of the log-probabilities alone; and a fit of all fitted rows, for other stores."""
    alone, rows = held_out_scores(trial.table, trial.folds), trial.plan.fitted
    if alone is None or trial.table.token_statistics is None:
        return
    beside_statistics(sample, trial.logits, alone, bool(fitted.probe.statistic_weights), result)
    whole = StatisticsAlone.fit(trial.table.token_statistics[rows], trial.table.labels[rows])
    result["statistics_alone"] = whole.to_dict()


def combined(trial: Trial, log_probabilities: Floats) -> Floats:
    """(judged rows,) log-probability and attention together, weighed for each fold by what was known.

    Args:
        trial: the rows that are judged.
        log_probabilities: (rows of the table,)
    """
    parts = [
        _combination(log_probabilities, known, trial.table, rows).score(
            log_probabilities[tested], trial.held_out[tested]
        )
        for known, (rows, tested) in zip(trial.known, trial.folds, strict=True)
    ]
    return joined(trial.folds, parts)


def _combination(log_probabilities: Floats, logits: Floats, table: Table, rows: Rows) -> baselines.Combination:
    return baselines.Combination.fit(log_probabilities[rows], logits[rows], table.take(rows))


def _probes(
    fitted: Fitted, trial: Trial, sample: Sample, seed: int, result: dict[str, Any], advance: Advance
) -> dict[str, Any]:
    """The recipe itself and those beside it; adds how it stands to the published one."""
    found: dict[str, Any] = {}
    for name, recipe in baselines.comparisons(fitted.recipe, trial.table).items():
        own = recipe is fitted.recipe
        logits = trial.logits if own else logits_over(recipe, trial.table, trial.folds, seed, advance)
        found[name] = {"kind": "probe", **sample.judge(logits)}
        if name == PAPER and not own:
            heads = {"heads": int(fitted.probe.selected.sum()), "of": fitted.probe.selected.size}
            result["against_paper"] = {"probe": result["probe"], **heads, **sample.difference(trial.logits, logits)}
    return found


def _shuffled_control(fitted: Fitted, trial: Trial, sample: Sample, seed: int, advance: Advance) -> dict[str, Any]:
    draws = _draws(trial.plan, baselines.SHUFFLES)
    deals = baselines.shuffled_control(fitted.recipe, trial.table, trial.folds, seed, draws, advance)
    logits, labels = np.stack([logit for _, logit in deals]), np.stack([dealt.labels for dealt, _ in deals])
    return {"kind": "control", "draws": len(deals), **sample.judge(logits, labels)}


def _head_controls(trial: Trial, sample: Sample, seed: int, advance: Advance) -> dict[str, dict[str, Any]]:
    draws = _draws(trial.plan, baselines.RANDOM_DRAWS)
    by_lot = baselines.random_head_scores(trial.probes, trial.table, trial.folds, seed, draws, advance)
    whole = baselines.all_head_scores(trial.probes, trial.table, trial.folds, seed, advance)
    return {
        "random_heads": {"kind": "control", "draws": len(by_lot), **sample.judge(by_lot)},
        "all_heads": {"kind": "control", **sample.judge(whole)},
    }


def _curve(recipe: LapwingRecipe, trial: Trial, sample: Sample, seed: int, advance: Advance) -> dict[str, Any]:
    found = learning_curve(recipe, trial.table, list(trial.folds), seed, advance, trial.probes)
    by_lot = [np.mean([sample.auroc(draw[trial.rows]) for draw in draws], axis=0) for draws in found.by_lot]
    return {
        "heads": list(found.heads),
        "selected": [estimate(sample.auroc(logits[trial.rows])) for logits in found.selected],
        "random": [estimate(values) for values in by_lot],
    }


def _out_of_fold(fitted: Fitted, trial: Trial, resamples: int, seed: int) -> Mapping[str, Any]:
    """The fitted rows, with the calibration that was set on them."""
    sample = Sample.of(trial.table.take(trial.plan.fitted), resamples, seed)
    probabilities = fitted.calibration.probabilities(fitted.held_out)
    return {**sample.about(), **sample.judge(fitted.held_out), **sample.calibration(probabilities)}


def _labels_and_groups(trial: Trial) -> tuple[Any, Any]:
    rows = trial.plan.fitted
    return trial.table.labels[rows], trial.table.groups[rows]


def _draws(plan: Plan, whole: int) -> int:
    """A control is drawn less often where every draw is fitted in each of several folds."""
    return whole if plan.folds == 1 else baselines.NESTED_DRAWS
