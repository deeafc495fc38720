"""Models with compiled parts are captured as they are, those that are compiled wholly are refused.

The backend `eager` takes a forward apart into graphs as any other does, and makes no machine code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lapwing_detector.capture import capture_attention
from lapwing_detector.errors import UnsupportedModel
from tests.detector.captures import STEP_BY_STEP
from tests.detector.tiny_models import captured_forward, difference, new_model, token_ids


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="eager", **options)


@pytest.mark.parametrize("part", ["the forward", "a layer"])
def test_what_is_compiled_is_captured(part: str) -> None:
    torch._dynamo.reset()
    model, ids = new_model("mistral", num_hidden_layers=1), token_ids(1, 30)
    (whole,) = captured_forward(model, ids)
    if part == "the forward":
        model.forward = compiled(model.forward)
    else:
        model.model.layers[0].compile(backend="eager")
    with torch.no_grad():
        model(ids, use_cache=False)  # makes a graph without capture, which must not be used within
        with capture_attention(model) as captured:
            model(ids, use_cache=False)
    assert difference(captured.summaries()[0], whole) < STEP_BY_STEP


def test_one_graph_for_all_is_refused() -> None:
    torch._dynamo.reset()
    model = new_model("llama", num_hidden_layers=1)
    model.forward = compiled(model.forward, fullgraph=True)
    with capture_attention(model), torch.no_grad(), pytest.raises(Exception, match="compile without fullgraph=True"):
        model(token_ids(1, 5))


def test_compiled_wholly_is_refused() -> None:
    model = new_model("llama")
    model.compile(backend="eager")
    for one in (model, compiled(new_model("llama"))):
        with pytest.raises(UnsupportedModel, match=r"is compiled|OptimizedModule is not"):
            capture_attention(one)
