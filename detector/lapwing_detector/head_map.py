"""One number per layer and head, and what it means. Computing is elsewhere; this holds and draws."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.features import FEATURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


@dataclass(frozen=True)
class Scale:
    """How one statistic is coloured and named."""

    label: str
    colours: str
    low: float
    high: float | None
    """Upper limit of the colour scale; None: the largest value."""

    names: tuple[str, ...] = ()
    """Of the values 0, 1, ...; empty for numbers."""


STATISTICS: dict[str, Scale] = {
    "P_VALUE": Scale("p-value", "viridis", 0.0, 1.0),
    "Q_VALUE": Scale("q-value (Benjamini-Hochberg)", "viridis", 0.0, 1.0),
    "AUROC": Scale("AUROC", "RdBu_r", 0.0, 1.0),
    "EFFECT_SIZE": Scale("rank-biserial effect size", "RdBu_r", -1.0, 1.0),
    "HEAD_PROBE": Scale("AUROC of each head alone", "RdBu_r", 0.0, 1.0),
    "WEIGHT": Scale("norm of the probe's weights", "magma", 0.0, None),
    "SELECTED": Scale("read by the probe", "Greys", 0.0, 1.0, ("no", "yes")),
}
"""Statistics by their name on the wire and in a probe's tensors."""


@dataclass(frozen=True)
class HeadMap:
    """One statistic of one feature for every head."""

    values: NDArray[np.float32]
    """(layers, heads)."""

    feature: str
    """Feature id, such as `laplacian_eigenvalues.v1`."""

    statistic: str
    """One of `STATISTICS`. A low P_VALUE marks a head that separates the classes."""

    layers: tuple[int, ...]
    """Index in the model of each row."""

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic is {self.statistic!r}; known are {', '.join(STATISTICS)}")
        if self.values.ndim != 2 or self.values.shape[0] != len(self.layers):
            raise ValueError(f"values {self.values.shape} must be (layers, heads) with {len(self.layers)} layers")

    @property
    def title(self) -> str:
        """The feature's name as people know it."""
        feature = FEATURES.get(self.feature)
        return feature.title if feature else self.feature

    def share_below(self, level: float) -> float:
        """Share of the heads whose value is below the level, in [0, 1]."""
        return float((self.values < level).mean())

    def plot(self, ax: Axes | None = None, title: str | None = None, colour_bar: bool = True) -> Axes:
        """Draws the map: x = head index, y = layer index.

        Args:
            ax: axes to draw on; a figure of its own without one (no pyplot, nothing global).
            title: heading; the feature's name without one.
            colour_bar: whether a colour scale is drawn beside it.

        Returns:
            The axes; `ax.figure` is the figure.
        """
        if ax is None:
            ax = new_figure(self.values.shape, columns=1).subplots()
        scale = STATISTICS[self.statistic]
        high = scale.high if scale.high is not None else float(self.values.max()) or 1.0
        image = ax.imshow(
            self.values,
            cmap=colour_map(scale),
            vmin=scale.low,
            vmax=high,
            aspect="auto",
            interpolation="nearest",
        )
        ax.set_title("\n".join(map(escaped, (title or self.title).split("\n"))), parse_math=False, fontsize=10)
        ax.set_xlabel("head index")
        ax.set_ylabel("layer index")
        label_ticks(ax, self.layers, self.values.shape[1])
        part_cells(ax, *self.values.shape)
        if colour_bar:
            draw_colour_bar(image, [ax], scale)
        return ax

    def render(self, format: str = "png", title: str | None = None) -> bytes:
        """The drawn map as the bytes of a `png` or `svg` file; the same map gives the same bytes."""
        figure = self.plot(title=title).get_figure(root=True)
        assert figure is not None
        return figure_bytes(figure, format)


def plot_pair(left: HeadMap, right: HeadMap, titles: tuple[str, str] | None = None) -> Figure:
    """Two maps of one statistic side by side, with one colour scale between them.

    Args:
        left: drawn on the left, by custom AttnScore.
        right: drawn on the right, by custom the Laplacian eigenvalues; same statistic and shape.
        titles: headings; the features' names, with the shares of low values for p- and q-values, without.

    Raises:
        ValueError: the statistics differ, so that one colour scale would lie.
    """
    if left.statistic != right.statistic or left.values.shape != right.values.shape:
        raise ValueError(
            f"a pair shares statistic and shape; these are {left.statistic} {left.values.shape} "
            f"and {right.statistic} {right.values.shape}"
        )
    figure = new_figure(left.values.shape, columns=2)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, head_map, title in zip(axes, (left, right), titles or (None, None), strict=True):
        head_map.plot(ax, title=title, colour_bar=False)
    axes[1].set_ylabel("")
    draw_colour_bar(axes[1].images[0], list(axes), STATISTICS[left.statistic])
    return figure


MARGINS: Final = (0.65, 0.85, 0.5, 0.5)
"""Inches at the left, for the layers; at the right, for what the colour scale says; at the bottom, for the heads; at
the top, for a title of two lines."""

BETWEEN: Final = 0.2
"""About so many inches between two maps, of which the right one has no labels of its own, and before the scale."""

BAR: Final = 0.2
"""About the width of a colour scale, in inches."""


def new_figure(shape: tuple[int, ...], columns: int) -> Figure:
    """An empty figure sized for maps of this shape, bound to no window and no global state."""
    from matplotlib.figure import Figure

    layers, heads = shape
    each = min(7.0, 2.6 + 0.22 * heads)
    width, height = columns * each + 0.8, min(8.0, 1.9 + 0.22 * layers)
    figure = Figure(figsize=(width, height), dpi=120)
    # What stands around the maps is known: a layout engine takes longer to find its place than to draw the picture.
    left, right, bottom, top = MARGINS
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, BETWEEN / each)
    return figure


def figure_bytes(figure: Figure, format: str) -> bytes:
    """A figure as the bytes of a `png` or `svg` file, without date and with fixed ids."""
    from matplotlib import rc_context

    if format not in ("png", "svg"):
        raise ValueError(f"format is {format!r}; known are png and svg")
    buffer, nameless = io.BytesIO(), "Date" if format == "svg" else "Software"
    with rc_context({"svg.hashsalt": "lapwing", "savefig.dpi": "figure", "savefig.bbox": None}):
        figure.savefig(buffer, format=format, metadata={nameless: None})
    return buffer.getvalue()


def colour_map(scale: Scale) -> Colormap:
    """Continuous for numbers, one colour a name for names."""
    from matplotlib import colormaps

    colours = colormaps[scale.colours]
    return colours.resampled(len(scale.names)) if scale.names else colours


def draw_colour_bar(image: AxesImage, axes: Sequence[Axes], scale: Scale) -> None:
    """One colour scale for all axes, labelled by the statistic."""
    figure = axes[0].figure
    inches = sum(ax.get_window_extent().width for ax in axes) / figure.dpi
    share, gap = (min(most, size / max(inches, size)) for most, size in ((0.15, BAR), (0.1, BETWEEN)))
    bar = figure.colorbar(image, ax=list(axes), label=scale.label, fraction=share, pad=gap)
    bar.ax.set_box_aspect(None)  # as high as the maps
    if scale.names:
        count = len(scale.names)
        bar.set_ticks([(place + 0.5) / count for place in range(count)], labels=scale.names)


def label_ticks(ax: Axes, layers: tuple[int, ...], heads: int) -> None:
    """Whole-numbered ticks, labelled with the layers' indices in the model."""
    rows, columns = labelled(len(layers)), labelled(heads)
    ax.set_yticks(list(rows), [str(layers[row]) for row in rows])
    ax.set_xticks(list(columns), [str(column) for column in columns])


def labelled(cells: int) -> range:
    """Which of so many cells in a row have a label: all of sixteen, of more about eight. Each takes a millisecond."""
    return range(0, cells, 1 if cells <= 16 else -(-cells // 8))


def part_cells(ax: Axes, layers: int, heads: int) -> None:
    """Thin lines between the cells, so that neighbours of one value can be told apart.

    One artist for all of them: a grid of minor ticks took as long as all the rest of the picture.
    """
    from matplotlib.collections import LineCollection

    right, bottom = heads - 0.5, layers - 0.5
    across = [((-0.5, row - 0.5), (right, row - 0.5)) for row in range(1, layers)]
    down = [((column - 0.5, -0.5), (column - 0.5, bottom)) for column in range(1, heads)]
    ax.add_collection(LineCollection(across + down, colors="0.6", linewidths=0.3), autolim=False)


def escaped(text: str, limit: int = 120) -> str:
    """Text from elsewhere made safe to draw: control characters and surrogates as escapes, cut to the limit."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
