"""Models with compiled parts are captured as they are, those that are compiled wholly are refused.

The backend `eager` takes a forward apart into graphs as any other does, and makes no machine code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from lapwing_detector.capture import capture_attention
from lapwing_detector.errors import UnsupportedModel
from lapwing_detector.summary import AttentionSummary
from tests.detector.captures import STEP_BY_STEP, padded
from tests.detector.tiny_models import captured_forward, difference, new_model, token_ids

STEPS = ((0, 18), (18, 19), (19, 20))
"""A prompt past the window of 16, and single tokens; every other number of rows makes more graphs, which takes long."""

TEXT = token_ids(STEPS[-1][1])


class Graphs:
    """A backend as `eager` that counts."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.made += 1
        return graph.forward


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


def test_generating_with_a_compiled_forward() -> None:
    graphs = Graphs()
    model, (ids, mask) = new_model("mistral", num_hidden_layers=2), padded([TEXT[:20], TEXT[:13]], "left")
    model.forward = torch.compile(model.forward, backend=graphs)
    with capture_attention(model) as captured:
        result = model.generate(ids, attention_mask=mask, max_new_tokens=3, eos_token_id=None)
    assert graphs.made > 0
    for summary, text in zip(captured.summaries(), (result[0], result[1, 7:]), strict=True):
        assert difference(summary, plain(text[None])) < STEP_BY_STEP


def test_decoding_over_a_static_cache_with_a_compiled_forward() -> None:
    graphs = Graphs()
    model = new_model("mistral", num_hidden_layers=2)
    model.forward = torch.compile(model.forward, backend=graphs)
    past = StaticCache(config=model.config, max_cache_len=len(TEXT))
    with capture_attention(model) as captured, torch.no_grad():
        for start, stop in STEPS:
            model(TEXT[None, start:stop], past_key_values=past)
    assert graphs.made > 0
    assert difference(captured.summaries()[0], plain(TEXT[None])) < STEP_BY_STEP


def plain(ids: Tensor) -> AttentionSummary:
    """Of one forward of such a model that is not compiled."""
    return captured_forward(new_model("mistral", num_hidden_layers=2), ids)[0]


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
