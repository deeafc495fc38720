"""Rows of attention in C over every cache, past the window's edge too, have the sums of the model's own eager maps."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from lapwing_detector import native
from tests.detector.captures import STEP_BY_STEP
from tests.detector.native_cases import needs_library
from tests.detector.test_capture_caches import CACHES, STEPS, captured_over, eager_over, largest
from tests.detector.tiny_models import COMMON, SHAPE, WINDOW, captured_forward, token_ids

pytestmark = [needs_library, pytest.mark.usefixtures("two_threads")]

IDS = token_ids(2, STEPS[-1][1])
SINGLE = sum(stop - start == 1 for start, stop in STEPS)


@cache
def wide_mistral() -> MistralForCausalLM:
    """Its heads are as wide as the library takes them for one row, and every layer has a window."""
    wide = {"hidden_size": 128, "initializer_range": 0.2, "sliding_window": WINDOW}
    return MistralForCausalLM(MistralConfig(**{**COMMON, **SHAPE, **wide})).eval()


def error(kind: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> float:
    """Of the sums over a cache, if the rows in C are told something else than they should."""
    rows, model, real = [], wide_mistral(), native.attend_row

    def attend_row(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        rows.append(key.shape[2])
        told = {name: change(key) if callable(change) else change for name, change in changes.items()}
        return real(query, key, value, **{**given, **told})

    monkeypatch.setattr(native, "attend_row", attend_row)
    summaries = captured_over(model, IDS, CACHES[kind](model.config))
    assert len(rows) == SINGLE * model.config.num_hidden_layers
    assert largest(eager_over(model, IDS, CACHES[kind](model.config)), captured_forward(model, IDS)) < STEP_BY_STEP
    return largest(summaries, eager_over(model, IDS, CACHES[kind](model.config)))


@pytest.mark.parametrize("kind", CACHES)
def test_over_every_cache(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(kind, monkeypatch) < STEP_BY_STEP


@pytest.mark.parametrize("kind", ["all keys"])
def test_control_the_window_matters(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(kind, monkeypatch, starts=None) > 0.01


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_control_the_keys_of_a_sliding_cache_are_the_last_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(kind, monkeypatch, tokens=lambda key: key.shape[2]) > 0.01
