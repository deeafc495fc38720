"""The heatmaps of a report: which statistic for which features, and how to read it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from lapwing_detector.head_map import STATISTICS, HeadMap
from lapwing_detector.pictures import PAIR, heading
from lapwing_detector.probe import Probe
from lapwing_training.report.blocks import Picture, Pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGINS = (0.5, 0.5, 0.45, 0.1)
"""In inches; at the right for the numbers of the colour scale."""

READING = {
    "P_VALUE": (
        "p-value",
        "Two-sided Mann-Whitney test of each head. A low p-value marks a head that separates the classes; bright cells "
        "carry no signal.",
    ),
    "Q_VALUE": (
        "q-value (Benjamini-Hochberg)",
        "The same, corrected for the number of heads of the feature: of the heads below .05, one in twenty is expected "
        "to be there by chance.",
    ),
    "AUROC": (
        "AUROC",
        "How well one number of each head ranks the answers. White is .5, no signal; red heads are higher for made-up "
        "answers, blue ones lower, and a probe can use either.",
    ),
    "HEAD_PROBE": (
        "Each head's own probe",
        "Cross-validated AUROC of a small logistic regression on each head alone. Red heads carry signal; white ones "
        "do not, and neither do pale blue ones, which are below .5 by chance.",
    ),
    "WEIGHT": ("Weight in the probe", "The norm of each head's weights: how much the probe leans on it."),
    "SELECTED": ("Heads that are read", "Black heads are read by the probe, white ones are not."),
}
"""By statistic, in the order of the page: the name of its row of pictures, and how they are read."""


def heatmaps(probe: Probe) -> tuple[Pictures, ...]:
    """One row of pictures for each statistic that the probe holds: AttnScore left, the Laplacian eigenvalues right."""
    found = (
        (title, caption + _more(probe, statistic), tuple(_maps(probe, statistic)))
        for statistic, (title, caption) in READING.items()
    )
    return tuple(Pictures(pictures, caption, title) for title, caption, pictures in found if pictures)


def _more(probe: Probe, statistic: str) -> str:
    of_probe = statistic in ("WEIGHT", "SELECTED") and probe.reads_log_probabilities
    return " The probe reads more than these: log-probabilities of the response's tokens, too." if of_probe else ""


def _maps(probe: Probe, statistic: str) -> Iterator[Picture]:
    for feature in sorted(probe.mapped_features, key=lambda name: (name not in PAIR, name)):
        of_probe = statistic in ("WEIGHT", "SELECTED") and feature in probe.features
        if of_probe or f"{feature}/{statistic}" in probe.statistics:
            name = f"{statistic}-{feature.partition('.')[0]}".lower().replace("_", "-")
            title = tuple(heading(probe, feature, statistic).split("\n"))
            alt = f"Heatmap over layers and heads, {STATISTICS[statistic].label}: {', '.join(title)}"
            yield Picture(
                name, alt, partial(_draw, probe.head_map(feature, statistic)), map_size(probe), MARGINS, title
            )


def map_size(probe: Probe) -> tuple[float, float]:
    """Width and height of a map, in inches."""
    return 4.4, min(4.6, 1.2 + 0.16 * probe.selected.shape[0])


def _draw(head_map: HeadMap, figure: Figure) -> None:
    ax = head_map.plot(figure.subplots())
    ax.set_title("")  # heading and name of the scale stand in the page
    figure.axes[-1].set_ylabel("")
    for side in ("top", "right"):
        ax.spines[side].set_visible(True)
