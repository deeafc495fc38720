"""From logit to probability: Platt's sigmoid, isotonic knots, and which speaks while a text is being written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression

from lapwing_detector.calibration import Calibration, StageCalibration, at_stage
from lapwing_detector.probe import Probe
from tests.detector.probes import random_probe

STAGES = (StageCalibration(0.25, 3.0, 0.5, -0.1), StageCalibration(0.5, 6.0, 0.8, 0.2))
KNOTS = ((-1.0, 0.1), (0.0, 0.1), (2.0, 0.8))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_platt_is_the_sigmoid(logits: list[float]) -> None:
    found = Calibration(1.5, -0.25).probabilities(np.array(logits))
    np.testing.assert_allclose(found, expit(1.5 * np.array(logits) - 0.25), atol=1e-15)
    assert [Calibration(1.5, -0.25).probability(logit) for logit in logits] == found.tolist()


def test_knots_speak_as_isotonic_regression_does() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=300)
    labels = rng.random(300) < expit(3 * np.abs(logits) * np.sign(logits))
    fitted = IsotonicRegression(out_of_bounds="clip", y_min=0, y_max=1).fit(logits, labels)
    knots = tuple(zip(fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist(), strict=True))
    asked = np.linspace(-5, 5, 1001)
    np.testing.assert_allclose(Calibration(1.0, 0.0, knots).probabilities(asked), fitted.predict(asked), atol=1e-12)
    assert np.abs(Calibration(1.0, 0.0).probabilities(asked) - fitted.predict(asked)).max() > 0.05  # a control


@pytest.mark.parametrize(
    "knots",
    [((0.0, 0.5), (0.0, 0.6)), ((1.0, 0.5), (0.0, 0.6)), ((0.0, 0.6), (1.0, 0.5)), ((0.0, 1.1),), ((np.nan, 0.5),)],
    ids=["twice", "falling logits", "falling probabilities", "above one", "nan"],
)
def test_knots_that_are_no_calibration_are_refused(knots: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError, match="knot"):
        Calibration(1.0, 0.0, knots)


@pytest.mark.parametrize(
    ("tokens", "spoken"),
    [
        (1, Calibration(0.5, -0.1)),  # before the first stage: the earliest there is
        (3, Calibration(0.5, -0.1)),
        (5, Calibration(0.5, -0.1)),
        (6, Calibration(0.8, 0.2)),
        (11, Calibration(0.8, 0.2)),
        (12, Calibration(2.0, 0.0)),  # where half of it has 6 tokens, all of it has 12
        (500, Calibration(2.0, 0.0)),
    ],
)
def test_the_stage_is_told_from_the_tokens_written(tokens: int, spoken: Calibration) -> None:
    assert at_stage(Calibration(2.0, 0.0), STAGES, tokens) == spoken


def test_without_stages_one_calibration_serves_for_all() -> None:
    assert at_stage(Calibration(2.0, 0.0), (), 1) == Calibration(2.0, 0.0)
    probe = random_probe()
    assert probe.running_probability(0.7, 1) == probe.calibration.probability(0.7)


@pytest.mark.parametrize("wrong", [(0.0, 3.0, 1.0, 0.0), (1.0, 3.0, 1.0, 0.0), (0.5, -1.0, 1.0, 0.0)])
def test_a_stage_is_a_part_of_a_response(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="stage"):
        StageCalibration(*wrong)


def test_knots_and_stages_are_kept_and_are_part_of_the_revision(tmp_path: Path) -> None:
    plain = random_probe()
    probe = replace(plain, calibration=Calibration(2.0, 0.1, KNOTS), stages=STAGES)
    again = Probe.from_pretrained(probe.save_pretrained(tmp_path / "probe"))
    assert (again.calibration, again.stages, again.revision) == (probe.calibration, probe.stages, probe.revision)
    others = [plain, replace(probe, stages=STAGES[:1]), replace(probe, calibration=Calibration(2.0, 0.1))]
    assert len({one.revision for one in (*others, probe)}) == 4


def test_stages_ascend() -> None:
    with pytest.raises(ValueError, match="ascend"):
        replace(random_probe(), stages=STAGES[::-1])
