"""The curves of a report, each drawn on an empty figure from numbers of the metrics. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import PrecisionRecallDisplay, RocCurveDisplay

from lapwing_detector.head_map import escaped, label_ticks
from lapwing_training.report.svg import FAINT, GROUND, INK, MADE_UP, OTHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Estimate = Mapping[str, float | None]
DASHED: dict[str, Any] = {"color": FAINT, "linestyle": "--", "linewidth": 0.8, "zorder": 0}


def roc(figure: Figure, points: Mapping[str, Sequence[float]], thresholds: Sequence[Mapping[str, Any]]) -> None:
    """The ROC curve with the operating points on it, where they came to lie."""
    ax = figure.subplots()
    display = RocCurveDisplay(
        fpr=np.array(points["false_positive_rate"]), tpr=np.array(points["true_positive_rate"])
    ).plot(ax=ax)
    display.line_.set(color=MADE_UP, linewidth=1.4)
    ax.plot([0, 1], [0, 1], **DASHED)
    for entry in thresholds:
        if entry["realised_rate"] is not None and entry["found"] is not None:
            at = (entry["realised_rate"], entry["found"])
            ax.plot(*at, "o", color=INK, markersize=3.5)
            label = f"{entry['false_positive_rate']:.0%}"
            ax.annotate(label, at, xytext=(5, -7), textcoords="offset points", fontsize=8)
    ax.set(xlabel="others flagged (false-positive rate)", ylabel="made-up answers found")


def precision_recall(figure: Figure, points: Mapping[str, Sequence[float]], base_rate: float | None) -> None:
    """The precision-recall curve over the base rate, which is what guessing gets."""
    ax = figure.subplots()
    precision, recall = np.array(points["precision"]), np.array(points["recall"])
    if recall[0] < recall[-1]:  # the steps are right when recall falls, as scikit-learn gives it
        precision, recall = precision[::-1], recall[::-1]
    display = PrecisionRecallDisplay(precision=precision, recall=recall).plot(ax=ax)
    display.line_.set(color=MADE_UP, linewidth=1.4)
    if base_rate is not None:
        ax.axhline(base_rate, **DASHED)
    ax.set(xlabel="made-up answers found (recall)", ylabel="made up among the flagged (precision)")


def reliability(figure: Figure, bins: Sequence[Mapping[str, float]]) -> None:
    """What came true against what was said, over how often it was said."""
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True, gridspec_kw={"hspace": 0.08})
    said, true, rows = (np.array([entry[name] for entry in bins]) for name in ("said", "true", "rows"))
    display = CalibrationDisplay(true, said, said).plot(ax=upper, name="probe", ref_line=False)
    display.line_.set(color=MADE_UP, marker="o", markersize=4, linewidth=1)
    upper.plot([0, 1], [0, 1], **DASHED)
    if upper.get_legend():
        upper.get_legend().remove()
    upper.set(xlabel="", ylabel="share made up", xlim=(0, 1), ylim=(0, 1))
    lower.bar(said, rows, width=0.06, color=OTHER, alpha=0.6)
    for at, count in zip(said, rows, strict=True):
        lower.annotate(
            f"{int(count):,}", (at, count), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=6.5
        )
    lower.set(xlabel="probability said", ylabel="rows", ylim=(0, float(rows.max()) * 1.3))


def histogram(figure: Figure, counts: Mapping[str, Sequence[float]]) -> None:
    """The probabilities of both classes, each as shares of its own class."""
    ax = figure.subplots()
    edges = np.array(counts["edges"])
    for name, label, colour in (("other", "others", OTHER), ("hallucinated", "made up", MADE_UP)):
        values = np.array(counts[name], dtype=np.float64)
        shares = values / max(float(values.sum()), 1.0)
        ax.stairs(shares, edges, fill=True, color=colour, alpha=0.25)
        ax.stairs(shares, edges, color=colour, linewidth=1.4, label=label)
    ax.legend(loc="upper center", ncols=2)
    ax.set(xlabel="probability said", ylabel="share of the class", xlim=(edges[0], edges[-1]))
    ax.margins(y=0.18)


def against_heads(figure: Figure, curve: Mapping[str, Any], read: int) -> None:
    """AUROC against number of heads: the best ones, and as many drawn by lot."""
    ax = figure.subplots()
    heads = np.array(curve["heads"])
    _band(ax, heads, curve["random"], OTHER, "drawn by lot", "s")
    _band(ax, heads, curve["selected"], MADE_UP, "selected", "o")
    ax.axvline(read, **DASHED)
    ax.set_xscale("log")
    shown: list[int] = []
    for count in reversed(curve["heads"]):
        if not shown or shown[-1] >= 1.3 * count:  # nearer ones would run into each other
            shown.append(count)
    ax.set_xticks(shown, [f"{count:,}" for count in shown])
    ax.set_xticks([], minor=True)
    ax.legend(loc="lower right")
    ax.set(xlabel="heads (the dashed line: what the probe reads)", ylabel="AUROC")


def against_fraction(figure: Figure, stages: Sequence[Mapping[str, Any]], names: Mapping[str, str], label: str) -> None:
    """Metrics of the stages, by key and label, against the fraction of the response that was seen."""
    ax = figure.subplots()
    seen = np.array([stage["fraction"] for stage in stages])
    for (name, meaning), colour, marker in zip(names.items(), (MADE_UP, OTHER), "os", strict=False):
        known = [(at, stage[name]) for at, stage in zip(seen, stages, strict=True) if stage.get(name) is not None]
        if known:
            _band(ax, np.array([at for at, _ in known]), [value for _, value in known], colour, meaning, marker)
    if len(names) > 1:
        ax.legend(loc="best")
    ax.set_xticks(seen, [f"{fraction:.0%}" for fraction in seen])
    ax.set(xlabel="of the response seen", ylabel=label)


def frequencies(figure: Figure, values: Any, layers: tuple[int, ...]) -> None:
    """How often each head was selected; layers from the top, heads from the left."""
    ax = figure.subplots()
    image = ax.imshow(np.array(values), cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    label_ticks(ax, layers, len(values[0]))
    ax.set(xlabel="head index", ylabel="layer index")
    figure.colorbar(image, ax=ax)


def forest(figure: Figure, rows: Sequence[tuple[str, Estimate]], own: str | None) -> None:
    """One line for each AUROC with its interval; the name stands above the line, so that narrow pages hold it."""
    ax = figure.subplots()
    known = [(name, found) for name, found in rows if found["value"] is not None]
    for row, (name, found) in enumerate(known):
        colour, weight = (MADE_UP, "bold") if name == own else (INK, "normal")
        value, low, high = _ends(found)
        ax.plot([low, high], [row, row], color=colour, linewidth=1.4, solid_capstyle="butt")
        ax.plot(value, row, "o", color=colour, markersize=4)
        ax.annotate(
            escaped(name, 60),
            (0, row),
            xycoords=("axes fraction", "data"),
            xytext=(0, 6),
            textcoords="offset points",
            fontsize=8,
            fontweight=weight,
            bbox={"facecolor": GROUND, "edgecolor": "none", "pad": 1},
        )
    ends = [end for _, found in known for end in _ends(found)]
    ax.axvline(0.5, **DASHED)
    ax.set(xlabel="AUROC", xlim=(min(*ends, 0.5) - 0.02, max(*ends, 0.5) + 0.02), ylim=(len(known) - 0.5, -0.9))
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")


def _ends(found: Estimate) -> tuple[float, float, float]:
    """Value, low and high; without an interval all are the value."""
    value, low, high = found["value"], found["low"], found["high"]
    assert value is not None
    return value, value if low is None else low, value if high is None else high


def _band(ax: Axes, at: Any, estimates: Sequence[Estimate], colour: str, label: str, marker: str) -> None:
    value, low, high = (
        np.array([np.nan if found[name] is None else found[name] for found in estimates], dtype=np.float64)
        for name in ("value", "low", "high")
    )
    ax.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.plot(at, value, color=colour, marker=marker, markersize=3.5, linewidth=1.4, label=label)
    ax.locator_params(axis="y", nbins=6)
