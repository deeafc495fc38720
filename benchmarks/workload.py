"""The model and the ways to run it: plain SDPA, captured, and the eager route. Runs in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from cases import BATCH, HEADS, HIDDEN, INTERMEDIATE, KEY_VALUE_HEADS, LAYERS, VOCABULARY, Way, Work
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from lapwing_detector.capture import capture_attention

Sums = list[tuple[Tensor, Tensor]]
"""For each sequence, diagonal and received (layers, heads, tokens), float32."""

SELECTED = {layer: tuple(range(layer // 2 % 2, HEADS, 2)) for layer in range(0, LAYERS, 2)}
"""A quarter of the heads, as a probe may choose them: half of the layers, and half of the heads there."""


class Clock:
    """Wall seconds since it was made, pauses left out."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Until now."""
        return time.perf_counter() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=16384,
        eos_token_id=None,  # or a generation might end early
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def make_inputs(work: Work, tokens: int) -> dict[str, Tensor]:
    """Token ids (sequences, tokens), and for a batch the mask of its padding, which is on the right."""
    generator = torch.Generator().manual_seed(tokens)
    sequences = BATCH if work == "batch" else 1
    ids = torch.randint(1, VOCABULARY, (sequences, tokens), generator=generator)
    if work != "batch":
        return {"input_ids": ids}
    lengths = torch.linspace(tokens // BATCH, tokens, BATCH).long()  # from an eighth to all of them
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def prefill(model: LlamaForCausalLM, inputs: dict[str, Tensor], new_tokens: int, clock: Clock) -> None:
    model(**inputs, logits_to_keep=1)


def decode(model: LlamaForCausalLM, inputs: dict[str, Tensor], new_tokens: int, clock: Clock) -> None:
    """Greedy steps with a growing cache. Reading the prompt does not count: `prefill` measures that."""
    cache = DynamicCache(config=model.config)
    with clock.paused():
        logits = model(**inputs, past_key_values=cache, logits_to_keep=1).logits
    for _ in range(new_tokens):
        logits = model(logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache, logits_to_keep=1).logits


def generate(model: LlamaForCausalLM, inputs: dict[str, Tensor], new_tokens: int, clock: Clock) -> None:
    model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)


WORK: dict[Work, Callable[[LlamaForCausalLM, dict[str, Tensor], int, Clock], None]] = {
    "prefill": prefill,
    "batch": prefill,
    "decode": decode,
    "generate": generate,
}


@torch.inference_mode()
def run(
    model: LlamaForCausalLM, way: Way, work: Work, inputs: dict[str, Tensor], new_tokens: int = 64
) -> tuple[float, Sums]:
    """Seconds that a user waits, and the sums if the way gives any.

    For the captured ways that is entering the context, the model's work, leaving the context and the summaries;
    for the eager route the forward and the reduction of its maps to the same arrays.
    """
    model.set_attn_implementation("eager" if way == "eager" else "sdpa")
    clock = Clock()
    if way == "sdpa":
        WORK[work](model, inputs, new_tokens, clock)
        return clock.seconds, []
    if way == "eager":
        if work != "prefill":
            raise ValueError(f"the eager route is measured at prefill only, not at {work}")
        sums = _reduced(model(**inputs, logits_to_keep=1, output_attentions=True).attentions)
        return clock.seconds, sums
    with capture_attention(model, **({"heads": SELECTED} if way == "selected" else {})) as captured:
        WORK[work](model, inputs, new_tokens, clock)
    summaries = captured.summaries()
    seconds = clock.seconds
    return seconds, [(torch.from_numpy(one.diagonal), torch.from_numpy(one.received)) for one in summaries]


def _reduced(maps: tuple[Tensor, ...]) -> Sums:
    """Of one sequence, from its maps: one (1, heads, tokens, tokens) for each layer."""
    diagonal = torch.stack([attention[0].diagonal(dim1=-2, dim2=-1).float() for attention in maps])
    received = torch.stack([attention[0].sum(dim=-2, dtype=torch.float32) for attention in maps])
    return [(diagonal, received)]
