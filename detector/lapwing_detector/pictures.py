"""The pictures of a probe: its heatmaps with headings that say what share of the heads carries signal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lapwing_detector.head_map import figure_bytes, new_figure, plot_pair
from lapwing_detector.probe import Probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIR = ("attention_score.v1", "laplacian_eigenvalues.v1")
"""The features that are shown side by side, left and right."""

LEVEL = 0.05


def heading(probe: Probe, feature: str, statistic: str) -> str:
    """The feature's name and, in a second line, what the map says as a whole."""
    head_map = probe.head_map(feature, statistic)
    if statistic in ("P_VALUE", "Q_VALUE"):
        stored = [name for name in ("P_VALUE", "Q_VALUE") if f"{feature}/{name}" in probe.statistics]
        shares = [probe.head_map(feature, name).share_below(LEVEL) for name in stored]
        parts = [f"{share:.0%} at {name[0].lower()} < .05" for name, share in zip(stored, shares, strict=True)]
        return f"{head_map.title}\n{', '.join(parts).replace(' at', ' of heads at', 1)}"
    if statistic == "AUROC":
        far = abs(head_map.values - 0.5).max()
        return f"{head_map.title}\nstrongest head {0.5 + far:.2f}, counted from .5 either way"
    if statistic == "HEAD_PROBE":
        return f"{head_map.title}\nbest head {head_map.values.max():.2f} by itself, on rows it was not fitted on"
    if statistic == "SELECTED":
        more = ", and log-probabilities" if probe.reads_log_probabilities else ""
        return f"{head_map.title}\n{int(head_map.values.sum())} of {head_map.values.size} heads are read{more}"
    return head_map.title


def draw(probe: Probe, statistic: str, features: Sequence[str] = PAIR) -> Figure:
    """One map, or two side by side with one colour scale.

    Raises:
        ValueError: the probe has no such map, or neither one nor two features are given.
    """
    if len(features) not in (1, 2):
        raise ValueError(f"{len(features)} features; a picture shows one or two")
    maps = [probe.head_map(feature, statistic) for feature in features]
    titles = [heading(probe, feature, statistic) for feature in features]
    if len(maps) == 2:
        return plot_pair(maps[0], maps[1], (titles[0], titles[1]))
    figure = new_figure(maps[0].values.shape, columns=1)
    maps[0].plot(figure.subplots(), title=titles[0])
    return figure


def card_pictures(probe: Probe) -> dict[str, bytes]:
    """What a model card shows, by file name: the pairs for which there are statistics, and the selected heads."""
    pictures = {
        f"{statistic.lower()}.png": figure_bytes(draw(probe, statistic), "png")
        for statistic in ("P_VALUE", "Q_VALUE", "AUROC", "HEAD_PROBE")
        if all(f"{feature}/{statistic}" in probe.statistics for feature in PAIR)
    }
    pictures["selected.png"] = figure_bytes(draw(probe, "SELECTED", probe.features[:1]), "png")
    return pictures
