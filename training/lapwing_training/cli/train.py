"""The verb `train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lapwing_training.cli.common import AsJson, Device, Dtype, failures, feature_ids, load_model, tell

EMBEDDED = "atlas"
"""How the embedded model is asked for; without a name it is taken where the store is its own."""


def train(
    store: Annotated[Path, typer.Argument(help="Feature store from lapwing extract.")],
    out: Annotated[Path, typer.Option(help="Probe directory to write.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="lapwing: selected heads; paper: all heads, PCA, as published; sink: L1 on sink scores; "
            "combined: lapwing, and the log-probabilities of the response's tokens, which is more than attention."
        ),
    ] = "lapwing",
    selection: Annotated[
        str,
        typer.Option(help="How lapwing and combined rank heads: fdr, top-m, l1, stability, or all."),
    ] = "fdr",
    features: Annotated[
        str, typer.Option(help="Comma-separated, such as laplacian_eigenvalues,attention_score; the recipe's without.")
    ] = "",
    k: Annotated[int, typer.Option(help="Values a head of a ranked feature; 0: chosen inside.")] = 0,
    heads: Annotated[int, typer.Option(help="Heads that lapwing and combined read; 0: chosen inside.")] = 0,
    test_share: Annotated[
        float | None,
        typer.Option(help="Share of the groups that is only tested on; nested cross-validation without it."),
    ] = None,
    guarantee: Annotated[
        bool, typer.Option(help="Set a fifth of the groups apart for thresholds that keep their promise.")
    ] = False,
    resamples: Annotated[int, typer.Option(help="Of the group bootstrap behind every interval.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of split, folds and resamples.")] = 0,
    name: Annotated[str, typer.Option(help="Name of the probe; from the directory without it.")] = "",
    model: Annotated[
        str,
        typer.Option(
            help="Model of the store, to colour the tokens of the worst examples; without it they are coloured only "
            f"where the store is of the embedded one, {EMBEDDED}."
        ),
    ] = "",
    device: Device = "cpu",
    dtype: Dtype = "",
    as_json: AsJson = False,
) -> None:
    """Fit a probe: select heads, calibrate, set thresholds, and judge it on groups that it never saw.

    Judged by nested cross-validation over all groups, or on the split that the items bring or --test-share makes. The
    directory holds the probe, report.html and report.md with every comparison, the heatmaps, and predictions.jsonl.

    Next: lapwing heatmap, lapwing evaluate, lapwing serve --probes.

    Example: lapwing train store --out my-probe
    """
    from lapwing_training.probe.train import TrainOptions, train_probe
    from lapwing_training.report import comparison_table

    with failures("train"):
        options = TrainOptions(
            recipe=recipe,
            features=feature_ids(features) if features else None,
            k=k or None,
            seed=seed,
            test_share=test_share,
            name=name or None,
            resamples=resamples,
            selection=selection,
            heads=heads or None,
            guarantee=guarantee,
        )
        model = model or (EMBEDDED if _of_the_embedded_model(store) else "")
        loaded = load_model("" if model == EMBEDDED else model, dtype, device) if model else None
        probe = train_probe(store, out, options, loaded)
        result = {"probe": str(out), "revision": probe.revision, "metrics": probe.metrics}
        for note in probe.metrics["notes"]:
            print(f"lapwing train: {note}", file=sys.stderr)
        tell(result, as_json, f"{comparison_table(probe.metrics)}\n\nprobe in {out}, report in {out / 'report.html'}")


def _of_the_embedded_model(store: Path) -> bool:
    """Whether the store holds attention of the model that is always at hand.

    Raises:
        StoreCorrupt: no store, or one that is damaged or unfinished.
    """
    from lapwing_detector import embedded
    from lapwing_detector.identity import ModelIdentity
    from lapwing_detector.probe import Probe
    from lapwing_training.store.store import read_index

    index, _ = read_index(store)
    return not ModelIdentity.from_dict(index["identity"]).differences(
        Probe.from_pretrained(embedded.probe_path()).identity
    )
