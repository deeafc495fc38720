"""The model of 8B shape on the GPU, and one run of it: plain or captured. Knows no limits and no table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from workload import Clock

from lapwing_detector import kernels
from lapwing_detector.capture import capture_attention
from lapwing_detector.summary import AttentionSummary

DEVICE = torch.device("cuda")
LAYERS, HEADS, KEY_VALUE_HEADS = 32, 32, 8
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "max_position_embeddings": 16384,
}
BYTES = 24 * 10**9
"""Memory that the weights (16 GB) and a forward over 8192 tokens take."""

QUARTER = {layer: range(layer % 4, HEADS, 4) for layer in range(LAYERS)}
"""Every fourth head: spread over all layers, the costliest way to read a quarter of them."""

NEW_TOKENS = 64

Work = Literal["prefill", "decode"]
Heads = Literal["all", "quarter"]


@dataclass(frozen=True)
class Run:
    """One run, plain or captured."""

    seconds: float
    """That a user waits: captured, from making the capture to having the summaries. Without the prompt of a decode."""

    forward: float
    """Of these, the model's own work."""

    logits: Tensor
    """(vocabulary,) float32, of the last token."""

    summary: AttentionSummary | None


def unable() -> str | None:
    """Why nothing can be measured here; None if it can."""
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU that torch can use here"
    free, _ = torch.cuda.mem_get_info()
    if free < BYTES:
        return f"the GPU has {free / 1e9:.0f} GB free, the model needs {BYTES / 1e9:.0f}"
    return None


def make_model() -> LlamaForCausalLM:
    """In bfloat16, made on the GPU."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            config = LlamaConfig(**SHAPE, eos_token_id=None, pad_token_id=0, attn_implementation="sdpa")
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_ids(tokens: int) -> Tensor:
    """(1, tokens + NEW_TOKENS): the prompt, and what is decoded after it. That is given instead of chosen, so that
    plain and captured runs read the same tokens and their logits can be compared."""
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    return torch.randint(1, SHAPE["vocab_size"], (1, tokens + NEW_TOKENS), generator=generator, device=DEVICE)


@torch.inference_mode()
def run(model: LlamaForCausalLM, work: Work, ids: Tensor, heads: Heads | None) -> Run:
    """Read a prompt, or the tokens after it, with these heads captured; None: with nothing captured."""
    prompt, new = ids[:, :-NEW_TOKENS], ids[:, -NEW_TOKENS:]
    cache = DynamicCache(config=model.config)
    _wait()
    clock = Clock()
    capture = None if heads is None else capture_attention(model, heads=QUARTER if heads == "quarter" else None)
    with capture or nullcontext():
        if work == "decode":
            with clock.paused():
                model(prompt, past_key_values=cache, logits_to_keep=1)
                _wait()
        alone = Clock()
        for part in new.split(1, dim=1) if work == "decode" else (prompt,):
            logits = model(part, past_key_values=cache, logits_to_keep=1).logits
        # The summaries would wait for the GPU anyway, so this costs the captured way nothing.
        _wait()
        forward = alone.seconds
    summary = None if capture is None else capture.summaries()[0]
    return Run(clock.seconds, forward, logits[0, -1].float(), summary)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Attention is captured by torch alone."""
    with patch.object(kernels, "available", lambda device: False):
        yield


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often the kernels' entries are called inside: never, where torch alone does the work."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        entry = getattr(kernels, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return entry(*arguments, **options)

        return call

    with patch.multiple(kernels, attend=counting("attend"), attend_row=counting("attend_row")):
        yield calls


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
