"""The tables of a report, from the metrics. Knows no markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_training.report.blocks import Table
from lapwing_training.report.words import (
    feature_title,
    interval,
    number,
    one_line,
    percent,
    percent_interval,
    title,
)

MOST_STRATA = 40
"""Rows of the table of strata; the largest stay."""


MOST_FREQUENT = 40
"""Rows of the table of selection frequencies."""


def comparisons(metrics: Mapping[str, Any]) -> Table:
    """One row for the probe and each thing beside it."""
    rows = comparison_rows(metrics)
    head = ("", "AUROC", "within", "AUPRC", "TPR at 1% FPR", "at 5%", "at 10%")
    cells = tuple(
        (
            name,
            interval(row["auroc"]),
            interval(row["within"]["mean"]) if "within" in row else "-",
            interval(row["auprc"]),
            *(interval(row[f"tpr_at_fpr_{rate}"]) for rate in ("0.01", "0.05", "0.10")),
        )
        for name, row in rows
    )
    return Table(head, cells, own=frozenset((0,)))


def comparison_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The probe first, then what stands beside it, by name for people."""
    comparison: Mapping[str, Any] = metrics["comparison"]
    own = metrics.get("probe")
    rows = [] if own in comparison else [("this probe", metrics["test"])]
    return rows + [
        (f"{title(name)} (this probe)" if name == own else title(name), comparison[name]) for name in ordered(metrics)
    ]


def ordered(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the comparison: the probe, other probes, combinations, baselines, controls; each kind by name.

    A probe that was saved and read keeps no order of its metrics, and its report is to stay the same.
    """
    kinds = ("probe", "combination", "baseline", "control")
    comparison, own = metrics["comparison"], metrics.get("probe")
    return sorted(comparison, key=lambda name: (name != own, kinds.index(comparison[name]["kind"]), name))


def over_draws(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """How far single draws lie apart, which the interval of their average does not say."""
    return tuple(
        f"{title(name)}: single AUROCs from {number(row['over_draws']['lowest'])} to "
        f"{number(row['over_draws']['highest'])} over {row['draws']} draws; the row above is their average."
        for name, row in ((name, metrics["comparison"][name]) for name in ordered(metrics))
        if "over_draws" in row
    )


def strata(metrics: Mapping[str, Any]) -> Table:
    """AUROC within each stratum, the largest first kept where there are very many."""
    comparison: Mapping[str, Any] = metrics["comparison"]
    columns = [name for name in ordered(metrics) if "within" in comparison[name] and name != metrics.get("probe")]
    columns = [name for name in columns if comparison[name]["kind"] != "control" or name == "random_heads"]
    shown = {"this probe": metrics["test"]} | {title(name): comparison[name] for name in columns}
    rows = tuple(
        (
            one_line(name, 80),
            f"{about['rows']:,}",
            percent(about["base_rate"]),
            *(interval(row["within"]["strata"][name]) if about["judged"] else "too few" for row in shown.values()),
        )
        for name, about in largest_strata(metrics)
    )
    return Table(("stratum", "rows", "hallucinated", *shown), rows)


def largest_strata(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The largest strata, by name."""
    found: Mapping[str, Any] = metrics["strata"]
    largest = sorted(found, key=lambda name: (-found[name]["rows"], name))[:MOST_STRATA]
    return [(name, found[name]) for name in sorted(largest)]


def thresholds(metrics: Mapping[str, Any]) -> Table:
    """Each operating point: what was promised and what came of it."""
    head = (
        "false alarms promised",
        "flag above logit",
        "set on negatives",
        "false alarms seen",
        "hallucinations found",
    )
    rows = tuple(
        (
            f"{entry['false_positive_rate']:.0%}",
            "-" if entry["logit"] is None else f"{entry['logit']:.4f}",
            f"{entry['negatives']:,}",
            percent_interval(entry["realised_rate"], entry.get("low"), entry.get("high")),
            percent(entry["found"]),
        )
        for entry in metrics["thresholds"]
    )
    return Table(head, rows)


def guarantee(promise: Mapping[str, Any]) -> Table:
    """The operating points set on rows that were kept apart for them."""
    rows = tuple(
        (
            f"{entry['false_positive_rate']:.0%}",
            "-" if entry["logit"] is None else f"{entry['logit']:.4f}",
            percent_interval(entry["realised_rate"], entry.get("low"), entry.get("high")),
        )
        for entry in promise["rates"]
    )
    return Table(("false alarms guaranteed", "flag above logit", "false alarms seen"), rows)


def reliability(test: Mapping[str, Any]) -> Table:
    """What was said, what was true, how often."""
    rows = tuple((f"{bin['said']:.3f}", f"{bin['true']:.3f}", f"{bin['rows']:,}") for bin in test["reliability"])
    return Table(("probability said", "share hallucinated", "rows"), rows, folded="Reliability in numbers")


def histogram(counts: Mapping[str, Any]) -> Table:
    """Rows of both classes by probability."""
    edges = counts["edges"]
    rows = tuple(
        (f"{low:.2f} to {high:.2f}", f"{made_up:,}", f"{other:,}")
        for low, high, made_up, other in zip(
            edges[:-1], edges[1:], counts["hallucinated"], counts["other"], strict=True
        )
    )
    return Table(("probability said", "made-up answers", "others"), rows, folded="Scores in numbers")


def against_heads(curve: Mapping[str, Any]) -> Table:
    """AUROC of so many heads, selected and drawn by lot."""
    rows = tuple(
        (f"{heads:,}", interval(selected), interval(by_lot))
        for heads, selected, by_lot in zip(curve["heads"], curve["selected"], curve["random"], strict=True)
    )
    return Table(("heads", "selected", "drawn by lot"), rows, folded="AUROC against heads in numbers")


def frequencies(values: Sequence[Sequence[float]], layers: Sequence[int], selected: NDArray[np.bool_]) -> Table:
    """How often the most stable heads were selected, and whether the probe reads them."""
    shares = np.array(values)
    order = np.argsort(-shares, axis=None, kind="stable")[:MOST_FREQUENT]
    places = zip(*np.unravel_index(order, shares.shape), strict=True)
    rows = tuple(
        (f"layer {layers[row]} head {head}", percent(float(shares[row, head])), "yes" if selected[row, head] else "no")
        for row, head in places
    )
    return Table(("head", "selected in", "read by the probe"), rows, folded="Selection frequencies in numbers")


def stages(found: list[Mapping[str, Any]]) -> Table:
    """What the probe knows while the answer is being written."""
    rows = tuple(
        (
            f"{stage['fraction']:.0%}",
            f"{stage['rows']:,}",
            f"{stage['tokens']:.0f}",
            interval(stage["auroc"]),
            interval(stage["brier"]),
            interval(stage["brier_final"]) if stage.get("brier_final") else "-",
        )
        for stage in found
    )
    head = ("response seen", "rows", "tokens (median)", "AUROC", "Brier, own calibration", "Brier, final calibration")
    return Table(head, rows)


def significance(metrics: Mapping[str, Any]) -> Table:
    """By feature, how many heads separate the classes, and which do it best."""
    rows = tuple(
        (
            feature_title(name),
            f"{entry['heads']:,}",
            f"{entry['share_p']:.0%}",
            f"{entry['share_q']:.0%}",
            "; ".join(f"layer {one['layer']} head {one['head']} {interval(one)}" for one in entry.get("strongest", ())),
        )
        for name, entry in metrics["significance"].items()
    )
    head = (
        "feature",
        "heads",
        "p\xa0<\xa0.05",
        "q\xa0<\xa0.05 (Benjamini-Hochberg)",
        "strongest heads: AUROC (95% DeLong)",
    )
    return Table(head, rows, wide=True)
