"""From a feature store to a probe directory: plan, fit, calibrate, judge, save."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from lapwing_detector.identity import ModelIdentity
from lapwing_detector.probe import NAME, Probe
from lapwing_detector.probe_files import MANIFEST
from lapwing_training.errors import InvalidOption, ModelMismatch
from lapwing_training.evaluation.drift import REFERENCE, Reference
from lapwing_training.evaluation.evaluate import evaluate_fit, evaluation_steps
from lapwing_training.evaluation.examples import worst_examples
from lapwing_training.evaluation.nested import fit, trial_of
from lapwing_training.evaluation.notes import notes
from lapwing_training.evaluation.plan import OUTER_FOLDS, plan_rows
from lapwing_training.evaluation.predictions import PREDICTIONS, predictions
from lapwing_training.probe.assemble import assemble, statistics_of, statistics_steps
from lapwing_training.probe.options import TrainOptions
from lapwing_training.recipes.fit import LapwingRecipe, make_recipe
from lapwing_training.report import html_report, model_card, training_report
from lapwing_training.statistics.significance import strongest_heads
from lapwing_training.store.store import Store, read_items, read_store

__all__ = ["TrainOptions", "name_from", "require_model", "require_place", "train_probe"]

if TYPE_CHECKING:
    from lapwing_detector.language_model import LanguageModel


def train_probe(
    store_path: Path, out: Path, options: TrainOptions | None = None, language_model: LanguageModel | None = None
) -> Probe:
    """Fit a probe on the rows of a store, judge it on rows that it did not see, and save it whole or not at all.

    Args:
        store_path: from `extract_features`, with labels.
        out: probe directory.
        options: how.
        language_model: the model of the store, to colour the tokens of the worst examples.

    Raises:
        NotEnoughData: too few rows, groups or classes.
        InvalidData: a group on both sides of a given split.
        NonFiniteFeatures: NaN among the features.
        InvalidOption: a feature, a k, a recipe or a selection that does not exist, or log-probabilities that the store
            does not hold.
        ModelMismatch: the language model is not that of the store.
        StoreCorrupt: a store that is damaged or unfinished.
    """
    options = options or TrainOptions()
    name = options.name or name_from(out)
    require_place(name, out)
    store, items = read_store(store_path), read_items(store_path)
    if language_model is not None:
        require_model(store, language_model)
    table = store.table.labelled()
    recipe = make_recipe(options.recipe, options.features, options.k, table.k, options.selection, options.heads)
    if isinstance(recipe, LapwingRecipe) and recipe.statistics:
        table.statistics(recipe.statistics)  # whether they are there is told before anything is fitted
    plan = plan_rows(table, options.test_share, options.guarantee, options.seed)
    # Many small products: on a shared machine threads that wait for each other made this seven times as slow.
    threads = max(1, (os.cpu_count() or 1) // 2)
    steps = 1 + OUTER_FOLDS + plan.pairs + statistics_steps(table) + evaluation_steps(recipe, table, plan)
    with threadpool_limits(threads), tqdm(total=steps, desc="train", unit="step") as progress:
        fitted = fit(table.take(plan.fitted), recipe, options.seed, progress.update)
        trial = trial_of(fitted, table, plan, progress.update)
        statistics = statistics_of(fitted, trial, progress.update)
        judged = evaluate_fit(fitted, trial, options.resamples, options.seed, progress.update)
    judged |= {"mode": store.mode, "command": options.command(store_path, out)}
    for feature, found in fitted.significance.items():
        judged["significance"][feature]["strongest"] = strongest_heads(found, store.layers)
    judged["notes"] = notes(fitted, judged)
    probe = assemble(name, fitted, trial, store, statistics, judged, options)
    judged["examples"] = worst_examples(trial, items, probe, language_model)
    probe = replace(probe, metrics=judged)
    files = {
        "report.md": training_report(probe).encode(),
        "report.html": html_report(probe).encode(),
        PREDICTIONS: predictions(fitted, trial).encode(),
        REFERENCE: Reference.of(fitted.probe, table.take(plan.fitted), options.seed).to_bytes(),
    }
    probe.save_pretrained(out, files=files, card=model_card(probe))
    return probe


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


def require_model(store: Store, language_model: LanguageModel) -> None:
    """The model is the one whose attention the store holds.

    Raises:
        ModelMismatch: it is not.
    """
    theirs, mine = ModelIdentity.from_dict(store.identity), language_model.identity
    different = theirs.differences(mine)
    if different:
        what, expected, found = different[0]
        raise ModelMismatch(
            f"the store comes from {theirs.name} with {what} {expected[:12]}, the model {mine.name} brings "
            f"{found[:12]}; give that model with --model, or none"
        )
