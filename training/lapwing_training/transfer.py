"""A fitted probe on another feature store of the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lapwing_detector.identity import ModelIdentity
from lapwing_detector.probe import Probe
from lapwing_training.baselines import DIRECTIONS, Combination
from lapwing_training.calibrate import OperatingPoint
from lapwing_training.errors import ModelMismatch, NotEnoughData
from lapwing_training.evaluate import judge_scores
from lapwing_training.metrics import RESAMPLES
from lapwing_training.sample import Sample
from lapwing_training.store import Store, read_store
from lapwing_training.table import Table, check_classes


def evaluate_probe(
    probe_path: str | Path,
    store_path: Path,
    resamples: int = RESAMPLES,
    seed: int = 0,
    seen_groups: bool = False,
) -> dict[str, Any]:
    """Judge a saved probe on a store.

    Groups that the probe was fitted on are left out unless `seen_groups`, since they would flatter it.

    Raises:
        ModelMismatch: the store comes from another model.
        NotEnoughData: nothing is left to be judged on.
        InvalidOption: the store lacks a feature that the probe reads.
    """
    probe, store = Probe.from_pretrained(probe_path), read_store(store_path)
    require_same_model(probe, store)
    table = store.table.labelled()
    seen = np.isin(table.groups, sorted(training_groups(Path(probe_path))))
    judged = table if seen_groups else _unseen(table, seen, store_path)
    logits = np.asarray(probe.logit(judged.stacked(probe.features, probe.k)))
    probabilities = np.asarray(probe.probability(judged.stacked(probe.features, probe.k)))
    points = [OperatingPoint(point.false_positive_rate, point.logit, point.negatives) for point in probe.thresholds]
    combination = probe.metrics.get("paired", {}).get("combination")
    result = judge_scores(
        Sample.of(judged, resamples, seed),
        judged,
        logits,
        probabilities,
        points,
        probe.metrics.get("baseline_directions", DIRECTIONS),
        None if combination is None else Combination.from_dict(combination),
    )
    about = {"probe": probe.name, "revision": probe.revision, "store": str(store_path)}
    return {**about, "seen_groups_left_out": 0 if seen_groups else int(seen.sum()), **result}


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


def training_groups(directory: Path) -> set[str]:
    """Groups that a probe was fitted on; empty when it came without its predictions."""
    path = directory / "predictions.jsonl"
    if not path.is_file():
        return set()
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    return {row["group"] for row in rows if row["fold"] == "out-of-fold"}


def _unseen(table: Table, seen: Any, store_path: Path) -> Table:
    rows = table.take(~seen)
    try:
        check_classes(rows.labels, f"rows of {store_path} whose group the probe was not fitted on")
    except NotEnoughData as error:
        raise NotEnoughData(f"{error}, or judge the others, too: --seen-groups") from None
    return rows
