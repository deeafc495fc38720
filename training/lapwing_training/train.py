"""From a feature store to a probe directory: split, fit, calibrate, judge, save."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from lapwing_detector.identity import ModelIdentity
from lapwing_detector.probe import NAME, Calibration, Probe, Threshold
from lapwing_detector.probe_files import MANIFEST
from lapwing_training.baselines import name_of
from lapwing_training.calibrate import operating_points, platt
from lapwing_training.errors import InvalidOption
from lapwing_training.evaluate import Fitted, evaluate_fit, evaluation_steps
from lapwing_training.fit import Recipe, make_recipe, out_of_fold_logits
from lapwing_training.metrics import RESAMPLES
from lapwing_training.options import LAPLACIAN, require_seed
from lapwing_training.progress import Advance, silent
from lapwing_training.report import model_card, training_report
from lapwing_training.significance import Floats, HeadSignificance, head_scalars, head_significance, strongest_heads
from lapwing_training.splits import split_by_group
from lapwing_training.store import Store, read_store
from lapwing_training.table import Table

OUTER_FOLDS = 5


@dataclass(frozen=True)
class TrainOptions:
    """How a probe is fitted."""

    recipe: str = "lapwing"
    features: tuple[str, ...] = (LAPLACIAN,)
    k: int | None = None
    """Eigenvalues per head; without it the store's for `lapwing`, and chosen inside for `paper`."""

    seed: int = 0
    test_share: float = 0.2
    name: str | None = None
    """The probe's name; made from the directory's without it."""

    resamples: int = RESAMPLES

    def __post_init__(self) -> None:
        require_seed(self.seed)


def train_probe(store_path: Path, out: Path, options: TrainOptions | None = None) -> Probe:
    """Fit a probe on the training rows of a store, judge it on the others and save it.

    Raises:
        NotEnoughData: too few rows, groups or classes.
        NonFiniteFeatures: NaN among the features.
        InvalidOption: a feature, a k or a recipe that does not exist.
        StoreCorrupt: a store that is damaged or unfinished.
    """
    options = options or TrainOptions()
    name = options.name or name_from(out)
    require_place(name, out)
    store = read_store(store_path)
    table = store.table.labelled()
    recipe = make_recipe(options.recipe, options.features, options.k, table.k)
    split = split_by_group(table, options.test_share, options.seed)
    # Many small products: on a shared machine threads that wait for each other made this seven times as slow.
    threads = max(1, (os.cpu_count() or 1) // 2)
    steps = 1 + OUTER_FOLDS + evaluation_steps(recipe, table)
    with threadpool_limits(threads), tqdm(total=steps, desc="train", unit="step") as progress:
        fitted = fit(table.take(split[0]), recipe, options.seed, progress.update)
        judged = evaluate_fit(fitted, table, split, options.resamples, options.seed, progress.update)
    for feature, found in fitted.significance.items():
        judged["significance"][feature]["strongest"] = strongest_heads(found, store.layers)
    judged["notes"] = notes(fitted, judged)
    tested = len(np.unique(table.groups[split[1]])) / len(np.unique(table.groups))
    probe = _assemble(name, fitted, store, judged, options, tested)
    files = {
        "report.md": training_report(probe).encode(),
        "predictions.jsonl": predictions(fitted, table.take(split[0]), table.take(split[1])).encode(),
    }
    probe.save_pretrained(out, files=files, card=model_card(probe))
    return probe


def fit(table: Table, recipe: Recipe, seed: int, advance: Advance = silent) -> Fitted:
    """Everything that is fitted, from training rows alone; advances once for the probe and once for each fold."""
    probe = recipe.fit(table, seed)
    advance()
    held_out = out_of_fold_logits(recipe, table, OUTER_FOLDS, seed, advance)
    slope, intercept = platt(held_out, table.labels)
    return Fitted(
        recipe=recipe,
        probe=probe,
        held_out=held_out,
        slope=slope,
        intercept=intercept,
        points=operating_points(held_out[table.labels == 0]),
        significance={
            name: head_significance(head_scalars(table.feature(name, probe.k)), table.labels, table.groups, errors=True)
            for name in table.features
        },
    )


def notes(fitted: Fitted, judged: Mapping[str, Any]) -> list[str]:
    """What a reader should know before trusting the numbers."""
    found = []
    if fitted.probe.chosen.get("significant_heads") == 0:
        found.append("No head separates the classes at q < .05; the strongest were taken all the same.")
    if fitted.slope == 0.0:
        found.append("The out-of-fold logits carry no signal: every probability is the base rate.")
    found += [
        f"No threshold at {point.false_positive_rate:.0%}: {point.reason}." for point in fitted.points if point.reason
    ]
    missing = judged["log_probability_missing"]
    if "log_probability" not in judged["comparison"]:
        found.append("The items carry no log-probability, so that baseline is absent; lapwing generate keeps it.")
    elif missing:
        found.append(f"{missing} test rows have no log-probability; they count as the middle one.")
    found += [f"No control with {name.replace('_', ' ')}: {reason}." for name, reason in judged["absent"].items()]
    shuffled = judged["comparison"].get("shuffled_labels", {"auroc": {"low": None}})["auroc"]
    if shuffled["low"] is not None and not shuffled["low"] <= 0.5 <= shuffled["high"]:
        found.append(
            f"With shuffled labels the AUROC is {shuffled['value']:.3f}, outside its own interval around .5; this "
            "happens by chance in 1 run of 20: train again with another --seed, and look for a leak if it stays."
        )
    return found


def name_from(out: Path) -> str:
    """A probe's name from its directory.

    Raises:
        InvalidOption: nothing of the directory's name can stand in a probe's name.
    """
    name = re.sub(r"[^a-z0-9]+", "-", out.resolve().name.lower()).strip("-")[:63].strip("-")
    if not name:
        raise InvalidOption(f"no probe name can be made from `{out.name}`; give one with --name, such as my-probe")
    return name


def require_place(name: str, out: Path) -> None:
    """Find out before the fit, not after it, that the probe could not be saved.

    Raises:
        InvalidOption: the name is no probe name, or the directory holds something else.
    """
    if not NAME.fullmatch(name):
        raise InvalidOption(
            f"name is `{name}`; expected small letters, digits and dashes, such as {name_from(Path(name))}"
        )
    if out.exists() and not (out / MANIFEST).exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidOption(f"{out} exists and is no probe directory; give another path with --out, or remove it")


def _assemble(
    name: str, fitted: Fitted, store: Store, judged: Mapping[str, Any], options: TrainOptions, test_share: float
) -> Probe:
    probe = fitted.probe
    realised = {entry["false_positive_rate"]: entry["realised_rate"] for entry in judged["thresholds"]}
    return Probe(
        name=name,
        features=probe.features,
        k=probe.k,
        layers=store.layers,
        weights=probe.weights,
        bias=probe.bias,
        selected=probe.selected,
        calibration=Calibration(fitted.slope, fitted.intercept),
        thresholds=tuple(
            Threshold(point.false_positive_rate, point.logit, realised[point.false_positive_rate], point.negatives)
            for point in fitted.points
            if point.logit is not None
        ),
        identity=ModelIdentity.from_dict(store.identity),
        statistics=dict(_statistics(fitted.significance)),
        metrics=judged,
        training={
            "recipe": options.recipe,
            "trained_as": name_of(fitted.recipe),
            "chosen": dict(probe.chosen),
            "seed": options.seed,
            "test_share": test_share,
            "outer_folds": OUTER_FOLDS,
            "store_digest": store.digest,
            "stratum": store.stratum,
            "left_out": len(store.left_out),
        },
    )


def _statistics(significance: Mapping[str, HeadSignificance]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for name, tested in significance.items():
        yield f"{name}/P_VALUE", tested.p_value.astype(np.float32)
        yield f"{name}/Q_VALUE", tested.q_value.astype(np.float32)
        yield f"{name}/AUROC", tested.auroc.astype(np.float32)
        yield f"{name}/EFFECT_SIZE", tested.effect_size.astype(np.float32)


def predictions(fitted: Fitted, train: Table, test: Table) -> str:
    """One line for each labelled row: training rows with their out-of-fold logit, test rows with the probe's own."""
    rows = [*_predicted(fitted, train, fitted.held_out, "out-of-fold")]
    rows += _predicted(fitted, test, fitted.probe.logit(test), "test")
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _predicted(fitted: Fitted, table: Table, logits: Floats, fold: str) -> Iterator[dict[str, Any]]:
    probabilities = expit(fitted.slope * logits + fitted.intercept)
    for row, (logit, probability) in enumerate(zip(logits.tolist(), probabilities.tolist(), strict=True)):
        yield {
            "id": str(table.ids[row]),
            "fold": fold,
            "logit": logit,
            "probability": probability,
            "label": int(table.labels[row]),
            "group": str(table.groups[row]),
            "stratum": str(table.strata[row]),
        }
