"""The model and the ways to run it: plain SDPA, captured, and the eager route."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from cases import BATCH, HEADS, HIDDEN, INTERMEDIATE, KEY_VALUE_HEADS, LAYERS, VOCABULARY, Way, Work
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from lapwing_detector.capture import Captured, capture_attention

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


@functools.cache
def make_model() -> LlamaForCausalLM:
    """The same one in a process, whatever was done to it, and in those that part from it afterwards."""
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


def prepare() -> None:
    """Make the model for the processes that part from this one.

    With one thread, for a process that has started threads must not part.
    """
    torch.set_num_threads(1)
    make_model()


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


def twin_of(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A second model with the same weights in memory, so that one can run plainly while the other is captured."""
    return copy.deepcopy(model, {id(weights): weights for weights in model.parameters()})


def prefill(model: LlamaForCausalLM, inputs: dict[str, Tensor], new_tokens: int) -> None:
    model(**inputs, logits_to_keep=1)


def generate(model: LlamaForCausalLM, inputs: dict[str, Tensor], new_tokens: int) -> None:
    model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)


WORK: dict[Work, Callable[[LlamaForCausalLM, dict[str, Tensor], int], None]] = {
    "prefill": prefill,
    "batch": prefill,
    "generate": generate,
}


@torch.inference_mode()
def run(
    model: LlamaForCausalLM, way: Way, work: Work, inputs: dict[str, Tensor], new_tokens: int = 64
) -> tuple[float, Sums]:
    """Seconds that a user waits, and the sums if the way gives any; of all work but decoding.

    For the captured ways that is entering the context, the model's work, leaving the context and the summaries;
    for the eager route the forward and the reduction of its maps to the same arrays.
    """
    model.set_attn_implementation("eager" if way == "eager" else "sdpa")
    clock = Clock()
    if way == "sdpa":
        WORK[work](model, inputs, new_tokens)
        return clock.seconds, []
    if way == "eager":
        if work != "prefill":
            raise ValueError(f"the eager route is measured at prefill only, not at {work}")
        sums = _reduced(model(**inputs, logits_to_keep=1, output_attentions=True).attentions)
        return clock.seconds, sums
    with _captured(model, way) as captured:
        WORK[work](model, inputs, new_tokens)
    summaries = captured.summaries()
    seconds = clock.seconds
    return seconds, [(torch.from_numpy(one.diagonal), torch.from_numpy(one.received)) for one in summaries]


@torch.inference_mode()
def decode(ways: Mapping[Way, LlamaForCausalLM], inputs: dict[str, Tensor], new_tokens: int) -> dict[Way, float]:
    """Seconds of greedy steps with a growing cache in each way, by the model that it has; the prompt does not count.

    The ways take turns step by step: a machine that others use is seldom the same for as long as all steps take.
    """
    for model in ways.values():
        model.set_attn_implementation("sdpa")
    parts = {way: _steps(model, way, inputs, new_tokens) for way, model in ways.items()}
    seconds = dict.fromkeys(ways, 0.0)
    for turn in range(new_tokens + 2):
        for way in ways if turn % 2 else reversed(ways):
            seconds[way] += next(parts[way])
    return seconds


def _steps(model: LlamaForCausalLM, way: Way, inputs: dict[str, Tensor], new_tokens: int) -> Iterator[float]:
    """Seconds of entering the context, of every step, and of leaving the context and the summaries."""
    clock = Clock()
    with nullcontext() if way == "sdpa" else _captured(model, way) as captured:
        yield clock.seconds
        cache = DynamicCache(config=model.config)
        logits = model(**inputs, past_key_values=cache, logits_to_keep=1).logits
        for _ in range(new_tokens):
            clock = Clock()
            logits = model(logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache, logits_to_keep=1).logits
            yield clock.seconds
        clock = Clock()
    if captured is not None:
        captured.summaries()
    yield clock.seconds


def _captured(model: LlamaForCausalLM, way: Way) -> Captured:
    return capture_attention(model, heads=SELECTED if way == "selected" else None)


def _reduced(maps: tuple[Tensor, ...]) -> Sums:
    """Of one sequence, from its maps: one (1, heads, tokens, tokens) for each layer."""
    diagonal = torch.stack([attention[0].diagonal(dim1=-2, dim2=-1).float() for attention in maps])
    received = torch.stack([attention[0].sum(dim=-2, dtype=torch.float32) for attention in maps])
    return [(diagonal, received)]
