"""What is drawn are the numbers that were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from report_fakes import estimate, full_metrics

from lapwing_training.report import (
    figures,
)


def drawn(draw: Callable[..., None], *arguments: Any) -> Any:
    figure = Figure()
    draw(figure, *arguments)
    return figure.axes[0]


def test_curves_pass_through_their_points() -> None:
    metrics = full_metrics()
    points = metrics["roc"]
    line = drawn(figures.roc, points, metrics["thresholds"]).lines[0]
    np.testing.assert_allclose(line.get_xydata().T, [points["false_positive_rate"], points["true_positive_rate"]])
    points = metrics["pr"]
    line = drawn(figures.precision_recall, points, 0.4).lines[0]
    np.testing.assert_allclose(line.get_xydata().T[:, ::-1], [points["recall"], points["precision"]])
    backwards = {name: values[::-1] for name, values in points.items()}
    same = drawn(figures.precision_recall, backwards, 0.4).lines[0]
    np.testing.assert_array_equal(same.get_xydata(), line.get_xydata())


def test_each_class_of_a_histogram_is_its_own_whole() -> None:
    stairs = drawn(figures.histogram, full_metrics()["histogram"]).patches
    assert len(stairs) == 4
    for patch in stairs:
        assert patch.get_data().values.sum() == pytest.approx(1.0)
    empty = {"edges": [0.0, 0.5, 1.0], "hallucinated": [0, 0], "other": [1, 2]}
    assert drawn(figures.histogram, empty).patches


def test_a_forest_has_a_line_for_each_that_is_known() -> None:
    rows = [("a", estimate(0.7)), ("b", {"value": None, "low": None, "high": None}), ("$c_", estimate(0.6))]
    ax = drawn(figures.forest, rows, "a")
    spans = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
    np.testing.assert_allclose(spans[:2], [(0.67, 0.73), (0.57, 0.63)])
    assert [text.get_text() for text in ax.texts] == ["a", "$c_"]
