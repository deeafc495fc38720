"""The check of the GPU benchmark sees kernels that agree with one another and are wrong; interpreted without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lapwing_detector import kernels

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts that import one another, no package

import gpu_check
import gpu_work

LAYERS, HEADS = 2, 4


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    if (what := kernels.missing()) is not None:
        pytest.skip(what)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    monkeypatch.setattr(gpu_work, "DEVICE", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    monkeypatch.setattr(gpu_work, "NEW_TOKENS", 6)
    monkeypatch.setattr(gpu_check, "CHECKED", {"prefill": 13, "decode": 2})
    monkeypatch.setattr(gpu_check, "LAYERS", LAYERS)
    monkeypatch.setattr(gpu_check, "HEADS", HEADS)
    small = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    shape = {**gpu_work.SHAPE, **small, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    monkeypatch.setattr(gpu_work, "SHAPE", shape)
    return gpu_work.make_model()


def windowed(entry: Callable[..., Any]) -> Callable[..., Any]:
    """Output and sums alike, of rows that see no more than the 3 newest columns."""

    def call(query: Any, key: Any, value: Any, **options: Any) -> Any:
        rows, columns = query.shape[2], key.shape[2]
        starts = (torch.arange(columns - rows, columns, dtype=torch.int32, device=key.device) - 2).clamp(min=0)[None]
        return entry(query, key, value, **{**options, "starts": starts})

    return call


def test_kernels_that_are_right_pass_and_are_counted(model: LlamaForCausalLM) -> None:
    with gpu_work.counted() as calls:
        assert max(gpu_check.against_torch(model).values()) < gpu_check.SAME / 4
    assert calls == {"attend": 2 * LAYERS, "attend_row": 6 * LAYERS}


@pytest.mark.parametrize("name", ["attend", "attend_row"])
def test_a_wrong_mask_shared_by_the_kernels_is_seen(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(kernels, name, windowed(getattr(kernels, name)))
    with pytest.raises(SystemExit, match="kernels and torch disagree"):
        gpu_check.against_torch(model)


def test_the_sums_of_some_heads_must_be_those_of_all_that_were_asked_for(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_work, "QUARTER", {layer: [layer] for layer in range(LAYERS)})
    ids = gpu_work.make_ids(9)
    plain, few = gpu_work.run(model, "prefill", ids, None), gpu_work.run(model, "prefill", ids, "quarter")
    gpu_check.require_right("quarter", plain, few)
    with pytest.raises(SystemExit, match="2 heads of 8"):
        gpu_check.require_right("all", plain, few)
