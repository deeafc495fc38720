"""Heatmaps: the numbers that are drawn, and that drawing is safe and repeatable."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lapwing_detector.head_map import HeadMap, escaped, figure_bytes, plot_pair
from lapwing_detector.pictures import draw, heading
from tests.detector.probes import random_probe

VALUES = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)


def head_map(values=VALUES, statistic="P_VALUE", feature="laplacian_eigenvalues.v1", layers=(0, 2, 5)) -> HeadMap:
    return HeadMap(values, feature, statistic, layers)


def test_the_picture_shows_these_values_with_heads_across_and_layers_down():
    ax = head_map().plot()
    assert np.array_equal(ax.images[0].get_array(), VALUES)
    assert ax.get_xlabel() == "head index"
    assert ax.get_ylabel() == "layer index"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2", "5"]  # indices in the model, not rows
    assert ax.images[0].get_clim() == (0.0, 1.0)


def test_a_pair_shares_one_colour_scale_labelled_by_the_statistic():
    figure = plot_pair(head_map(feature="attention_score.v1"), head_map(VALUES / 2))
    left, right, bar = figure.axes
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0.0, 1.0)
    assert bar.get_ylabel() == "p-value"
    assert left.get_title() == "AttnScore"
    assert right.get_title() == "Laplacian eigenvalues"


def test_a_pair_of_two_statistics_would_lie_and_is_refused():
    with pytest.raises(ValueError, match="shares statistic and shape"):
        plot_pair(head_map(), head_map(statistic="AUROC"))


def test_the_heading_counts_the_heads():
    probe = random_probe()
    below = (probe.statistics["attention_score.v1/P_VALUE"] < 0.05).mean()
    assert f"{below:.0%} of heads at p < .05" in heading(probe, "attention_score.v1", "P_VALUE")
    assert f"{int(probe.selected.sum())} of 8 heads" in heading(probe, "attention_score.v1", "SELECTED")


@pytest.mark.parametrize(
    "statistic", ["P_VALUE", "Q_VALUE", "AUROC", "EFFECT_SIZE", "HEAD_PROBE", "WEIGHT", "SELECTED"]
)
def test_every_statistic_draws_as_png_and_svg_and_the_same_twice(statistic):
    probe = random_probe()
    for format in ("png", "svg"):
        once, twice = (figure_bytes(draw(probe, statistic), format) for _ in range(2))
        assert once == twice
        assert once.startswith(b"\x89PNG") if format == "png" else ElementTree.fromstring(once).tag.endswith("svg")


def test_a_picture_is_drawn_once(monkeypatch):
    drawn, draw_it = [], Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda figure, renderer: drawn.append(figure) or draw_it(figure, renderer))
    figure, another = (head_map().plot().get_figure(root=True) for _ in range(2))
    figure_bytes(figure, "png")
    assert drawn == [figure]
    another.set_layout_engine("constrained")
    figure_bytes(another, "png")
    assert drawn[1:] == [another, another], "control: a layout is found by drawing"


LARGEST = [("P_VALUE", 1), ("Q_VALUE", 1), ("AUROC", 1), ("EFFECT_SIZE", 1), ("SELECTED", 1)]


@pytest.mark.parametrize(("statistic", "largest"), [*LARGEST, ("WEIGHT", 3e-3), ("WEIGHT", 12345)])
@pytest.mark.parametrize("shape", [(6, 8), (32, 32), (80, 64)])
def test_nothing_around_the_maps_is_cut_or_lies_on_something_else(shape, statistic, largest):
    values = np.full(shape, largest, np.float32)
    one = head_map(values, statistic=statistic, layers=tuple(range(100, 100 + shape[0])))
    alone = one.plot(title="heads\nthat are read").get_figure(root=True)
    for figure in (alone, plot_pair(one, one, ("left\nheads", "right\nheads"))):
        renderer = FigureCanvasAgg(figure).get_renderer()
        boxes = [ax.get_tightbbox(renderer) for ax in figure.axes]
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
        assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
        assert all(left.x1 <= right.x0 for left, right in pairwise(boxes)), "they stand from left to right"
        figure.subplots_adjust(left=0.0)
        assert figure.axes[0].get_tightbbox(renderer).x0 < figure.bbox.x0, "control: a margin that is too narrow"


@pytest.mark.parametrize(("cells", "labels", "step"), [(1, 1, 1), (16, 16, 1), (17, 6, 3), (32, 8, 4), (80, 8, 10)])
def test_every_cell_of_a_few_has_a_label_and_some_of_many(cells: int, labels: int, step: int) -> None:
    ax = head_map(np.zeros((cells, cells), np.float32), layers=tuple(range(cells))).plot()
    assert list(ax.get_xticks()) == list(ax.get_yticks()) == [step * place for place in range(labels)]


def test_cells_are_parted_by_one_artist_however_many_they_are():
    for shape in ((2, 3), (24, 40)):
        ax = head_map(np.zeros(shape, np.float32), layers=tuple(range(shape[0]))).plot()
        [lines] = ax.collections
        assert len(lines.get_segments()) == sum(shape) - 2
        assert len(ax.get_xticks()) <= 16
        assert not len(ax.get_xticks(minor=True))
        assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, shape[1] - 0.5), (shape[0] - 0.5, -0.5))


def test_settings_of_matplotlib_do_not_change_the_picture():
    ours = head_map().render()
    with rc_context({"savefig.dpi": 300, "savefig.bbox": "tight"}):
        assert head_map().render() == ours
        theirs = io.BytesIO()
        head_map().plot().get_figure(root=True).savefig(theirs, metadata={"Software": None})
    assert theirs.getvalue() != ours, "control"


def test_a_map_is_drawn_into_small_axes_of_ones_own():
    axes = Figure(figsize=(6, 2)).subplots(1, 12)
    assert head_map().plot(axes[0]).get_position().width > 0.7 * axes[1].get_position().width


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="known are png and svg"):
        head_map().render("pdf")


def test_text_of_others_is_shown_and_not_interpreted():
    hostile = "$\\frac{1}{0}$ \x1b[31m \ud800 \u202e"
    svg = head_map().render("svg", title=hostile)
    assert b"\x1b" not in svg
    shown = escaped(hostile)
    assert "\\x1b" in shown
    assert "\\ud800" in shown
    assert shown.isprintable()
    assert len(escaped("a" * 1000)) == 120


def test_share_below_counts_strictly():
    assert head_map(np.array([[0.05, 0.04], [0.5, 0.9]], np.float32), layers=(0, 1)).share_below(0.05) == 0.25


def test_a_map_of_the_wrong_shape_or_statistic_cannot_be_made():
    with pytest.raises(ValueError, match="with 2 layers"):
        head_map(layers=(0, 1))
    with pytest.raises(ValueError, match="known are P_VALUE"):
        head_map(statistic="MEAN")


def test_nothing_global_is_touched_and_pyplot_stays_out():
    code = (
        "import sys, numpy as np; from lapwing_detector.head_map import HeadMap; "
        "assert 'matplotlib' not in sys.modules; "
        "HeadMap(np.eye(2, dtype='float32'), 'sink_scores.v1', 'AUROC', (0, 1)).render('png'); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
