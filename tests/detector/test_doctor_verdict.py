"""The doctor's differences and tolerances."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lapwing_detector.doctor.verdict import difference, tolerance
from lapwing_detector.errors import CaptureError
from lapwing_detector.summary import AttentionSummary


def summary(received: float = 1.0) -> AttentionSummary:
    values = np.ones((1, 2, 9), np.float32)
    return AttentionSummary(values.copy(), values * received, (4,))


def test_a_difference_is_relative_above_one_and_knows_its_place():
    other = summary(10.0)
    other.received[0, 1, 3] += 1.0
    one = difference(other, summary(10.0))
    assert (one.largest, one.median, one.layer, one.head) == (pytest.approx(0.1), 0.0, 4, 1)
    assert difference(summary(), summary()).largest == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_never_within_the_tolerance(dtype):
    other = summary()
    assert tolerance(dtype).allows(difference(other, summary()))
    other.diagonal[0, 0, 0] = np.nan
    assert difference(other, summary()).largest == np.inf
    assert not tolerance(dtype).allows(difference(other, summary()))


def test_summaries_of_other_texts_are_not_compared():
    with pytest.raises(CaptureError, match="both must be of the same"):
        difference(summary(), replace(summary(), layers=(3,)))
