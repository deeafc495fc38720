"""A fitted probe on another feature store of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lapwing_detector.identity import ModelIdentity
from lapwing_detector.probe import Probe
from lapwing_training.errors import ModelMismatch, NotEnoughData
from lapwing_training.evaluation.baselines import DIRECTIONS, Combination, raw_scores
from lapwing_training.evaluation.calibrate import OperatingPoint
from lapwing_training.evaluation.drift import Reference, drift_of
from lapwing_training.evaluation.notes import mode_note
from lapwing_training.evaluation.predictions import seen_groups as groups_seen_by
from lapwing_training.evaluation.sample import Sample
from lapwing_training.evaluation.scores import Scores, judge_scores, judging_steps, realised
from lapwing_training.evaluation.stages import stages_elsewhere
from lapwing_training.evaluation.statistics_alone import StatisticsAlone, beside_statistics
from lapwing_training.options import require_resamples, require_seed
from lapwing_training.recipes.fit import LinearProbe
from lapwing_training.statistics.metrics import RESAMPLES
from lapwing_training.statistics.significance import Floats
from lapwing_training.store.store import Store, read_store
from lapwing_training.store.table import Table, check_classes


def evaluate_probe(
    probe_path: str | Path,
    store_path: Path,
    resamples: int = RESAMPLES,
    seed: int = 0,
    seen_groups: bool = False,
) -> dict[str, Any]:
    """Judge a probe, by its directory or Hub id, on a store, and say how far the store lies from the probe's own.

    Groups that the probe was fitted on are left out unless `seen_groups`, since they would flatter it.

    Raises:
        ModelMismatch: the store comes from another model.
        NotEnoughData: nothing is left to be judged on, or nobody knows what the probe was fitted on.
        InvalidOption: the store lacks a feature that the probe reads, or the seed or the resamples are none.
        InvalidData: the probe's predictions or its reference can't be read.
    """
    require_seed(seed)
    require_resamples(resamples)
    probe, store = Probe.from_pretrained(probe_path), read_store(store_path)
    require_same_model(probe, store)
    table, directory = store.table.labelled(), directory_of(probe_path)
    known = None if seen_groups else groups_seen_by(directory)
    seen = np.isin(table.groups, sorted(known.fitted if known else ()))
    judged = table if known is None else _unseen(table, seen, store_path)
    # Rows that the probe's own report judges may be fresh to the probe, but they are not to that report.
    again = known is None or bool(np.isin(judged.groups, sorted(known.judged)).any())
    reference = Reference.load(directory)
    with tqdm(total=judging_steps(judged) + 1, desc="evaluate", unit="step") as progress:
        scores, sample = _scores(probe, judged), Sample.of(judged, resamples, seed)
        result = judge_scores(sample, judged, scores, progress.update)
        _beside_statistics(probe, judged, sample, scores.logits, result)
        points = [OperatingPoint(one.false_positive_rate, one.logit, one.negatives) for one in probe.thresholds]
        limits = [np.full(len(judged), one.logit) for one in probe.thresholds]
        # What was guaranteed is about one random row of a group, so each group counts once in what came of it.
        once = bool(probe.training.get("guarantee"))
        result["thresholds"] = realised(sample, points, limits, scores.logits, each_group_once=once)
        result["drift"] = drift_of(probe, reference, judged, sample, scores, seed, again)
        result["stages"] = stages_elsewhere(probe, probe_logits, judged, sample)
        progress.update()
    notes = mode_note(probe.training.get("mode"), store.mode)
    if reference is None:
        notes.append("The probe came without a sample of the rows that it was fitted on: no drift by head or length.")
    if again and known is not None:
        notes.append("The probe's own report judges groups of these rows, too: the change of AUROC has no interval.")
    about = {"probe": probe.name, "revision": probe.revision, "store": str(store_path), "mode": store.mode}
    return {**about, "seen_groups_left_out": int(seen.sum()), "notes": notes, **result}


def require_same_model(probe: Probe, store: Store) -> None:
    """The store's attention is that of the probe's model.

    Raises:
        ModelMismatch: it is not.
    """
    other = ModelIdentity.from_dict(store.identity)
    different = probe.identity.differences(other)
    if different or probe.layers != store.layers:
        what, mine, theirs = different[0] if different else ("layers", str(probe.layers), str(store.layers))
        raise ModelMismatch(
            f"probe `{probe.name}` was fitted on {probe.identity.name} with {what} {mine[:12]}, the store comes from "
            f"{other.name} with {theirs[:12]}; fit one for it: lapwing train {{STORE}} --out {{PROBE}}"
        )


def directory_of(probe_path: str | Path) -> Path:
    """Where the files of a probe lie that was loaded already: its directory, or the cache of the Hub."""
    from huggingface_hub import snapshot_download

    here = Path(probe_path)
    return here if here.is_dir() else Path(snapshot_download(str(probe_path), local_files_only=True))


def _scores(probe: Probe, table: Table) -> Scores:
    """The probe's, and the baselines with the directions and the combination that its training rows gave them."""
    logits = probe_logits(probe, table)
    signs = DIRECTIONS | dict(probe.metrics.get("baseline_directions", {}))
    raw = raw_scores(table)
    combination, both = probe.metrics.get("paired", {}).get("combination"), None
    if combination is not None and "log_probability" in raw:
        both = Combination.from_dict(combination).score(raw["log_probability"], logits)
    oriented = {name: signs[name] * values for name, values in raw.items()}
    return Scores(logits, probe.calibration.probabilities(logits), oriented, both)


def _beside_statistics(probe: Probe, table: Table, sample: Sample, logits: Floats, result: dict[str, Any]) -> None:
    """Statistics of the log-probabilities, where both stores hold them, as the probe's training rows weighed them."""
    kept = probe.metrics.get("statistics_alone")
    if kept is None or table.token_statistics is None:
        return
    alone = StatisticsAlone.from_dict(kept).score(table.token_statistics)
    beside_statistics(sample, logits, alone, probe.reads_log_probabilities, result)


def probe_logits(probe: Probe, table: Table) -> Floats:
    """(rows,), read block by block."""
    read = (probe.features, probe.k, probe.weights, probe.bias, probe.selected)
    return LinearProbe(*read, chosen={}, statistic_weights=probe.statistic_weights).logit(table)


def _unseen(table: Table, seen: Any, store_path: Path) -> Table:
    rows = table.take(~seen)
    try:
        check_classes(rows.labels, f"rows of {store_path} whose group the probe was not fitted on")
    except NotEnoughData as error:
        raise NotEnoughData(f"{error}, or judge the others, too: --seen-groups") from None
    return rows
