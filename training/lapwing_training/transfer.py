"""A fitted probe on another feature store of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lapwing_detector.identity import ModelIdentity
from lapwing_detector.probe import Probe
from lapwing_training.baselines import DIRECTIONS, Combination
from lapwing_training.calibrate import OperatingPoint
from lapwing_training.errors import InvalidData, ModelMismatch, NotEnoughData
from lapwing_training.evaluate import judge_scores, judging_steps
from lapwing_training.files import from_json
from lapwing_training.metrics import RESAMPLES
from lapwing_training.options import require_seed
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
    """Judge a probe, by its directory or Hub id, on a store.

    Groups that the probe was fitted on are left out unless `seen_groups`, since they would flatter it.

    Raises:
        ModelMismatch: the store comes from another model.
        NotEnoughData: nothing is left to be judged on, or nobody knows what the probe was fitted on.
        InvalidOption: the store lacks a feature that the probe reads, or the seed is none.
        InvalidData: the probe's predictions can't be read.
    """
    require_seed(seed)
    probe, store = Probe.from_pretrained(probe_path), read_store(store_path)
    require_same_model(probe, store)
    table = store.table.labelled()
    seen = np.zeros(len(table), dtype=bool)
    if not seen_groups:
        seen = np.isin(table.groups, sorted(training_groups(directory_of(probe_path))))
    judged = table if seen_groups else _unseen(table, seen, store_path)
    logits = np.asarray(probe.logit(judged.stacked(probe.features, probe.k)))
    probabilities = np.asarray(probe.probability(judged.stacked(probe.features, probe.k)))
    points = [OperatingPoint(point.false_positive_rate, point.logit, point.negatives) for point in probe.thresholds]
    combination = probe.metrics.get("paired", {}).get("combination")
    with tqdm(total=judging_steps(judged), desc="evaluate", unit="step") as progress:
        result = judge_scores(
            Sample.of(judged, resamples, seed),
            judged,
            logits,
            probabilities,
            points,
            DIRECTIONS | dict(probe.metrics.get("baseline_directions", {})),
            None if combination is None else Combination.from_dict(combination),
            progress.update,
        )
    about = {"probe": probe.name, "revision": probe.revision, "store": str(store_path)}
    return {**about, "seen_groups_left_out": int(seen.sum()), **result}


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


def training_groups(directory: Path) -> set[str]:
    """Groups that a probe was fitted on.

    Raises:
        NotEnoughData: it came without its predictions, so nobody knows.
        InvalidData: they can't be read.
    """
    path = directory / "predictions.jsonl"
    if not path.is_file():
        raise NotEnoughData(
            f"{path} is missing, so nobody knows which groups the probe was fitted on; fetch the whole probe, or judge "
            "on all groups, which flatters it: --seen-groups"
        )
    try:
        rows = [from_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return {row["group"] for row in rows if row["fold"] == "out-of-fold"}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidData(path, None, f"no predictions of lapwing train ({error}); fetch the probe again") from None


def _unseen(table: Table, seen: Any, store_path: Path) -> Table:
    rows = table.take(~seen)
    try:
        check_classes(rows.labels, f"rows of {store_path} whose group the probe was not fitted on")
    except NotEnoughData as error:
        raise NotEnoughData(f"{error}, or judge the others, too: --seen-groups") from None
    return rows
