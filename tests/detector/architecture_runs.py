"""Runs of a model over a cache: what is captured of them, and its own eager maps of the very same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lapwing_detector.capture import capture_attention
from lapwing_detector.summary import AttentionSummary
from tests.detector.captures import padded
from tests.detector.tiny_models import PAD, difference, token_ids

CHUNKS = ((0, 20), (20, 26), *((at, at + 1) for at in range(26, 31)))
"""A prompt past the window's edge in two parts, then single tokens."""

PROMPTS, NEW = (12, 7), 6
"""Lengths of the prompts of one batch, and how many tokens are generated: past the window's edge."""

Maps = Sequence[Tensor | None]
"""What a model returns of one step: of each layer (batch, heads, rows, keys), or of each that has attention."""


class NoCache(Exception):
    """A model did not return the cache that it filled, so nothing can follow."""


@dataclass(frozen=True)
class Ran:
    """What is captured of a batch."""

    summaries: list[AttentionSummary]
    ids: Tensor
    """(batch, tokens), padded on the left."""

    padding: tuple[int, ...]
    """Of each sequence, how many of its tokens are padding."""

    def texts(self) -> list[Tensor]:
        """(1, tokens) each."""
        return [row[None, start:] for start, row in zip(self.padding, self.ids, strict=True)]


def in_chunks(model: PreTrainedModel, **options: Any) -> Ran:
    ids = token_ids(2, CHUNKS[-1][1], seed=1)
    with capture_attention(model, **options) as captured:
        for _ in _fed(model, ids):
            pass
    return Ran(captured.summaries(), ids, (0, 0))


def eager_in_chunks(model: PreTrainedModel, ids: Tensor) -> list[Maps]:
    return [output.attentions for output in _fed(model, ids, output_attentions=True)]


def _fed(model: PreTrainedModel, ids: Tensor, **options: Any) -> Iterator[Any]:
    """What the model returns for each of CHUNKS."""
    past = None
    for start, stop in CHUNKS:
        with torch.no_grad():
            output = model(ids[:, start:stop], past_key_values=past, use_cache=True, **options)
        past = getattr(output, "past_key_values", None)
        if past is None:
            raise NoCache
        yield output


def generating(model: PreTrainedModel, **options: Any) -> Ran:
    torch.manual_seed(3)
    with capture_attention(model, **options) as captured:
        ids = _generate(model, NEW, do_sample=True)
    return Ran(captured.summaries(), ids, tuple(max(PROMPTS) - length for length in PROMPTS))


def eager_generating(model: PreTrainedModel, ids: Tensor) -> list[Maps]:
    """It is made to generate the same, and one more so that the newest token has a row."""

    def forced(row: int, before: Tensor) -> list[int]:
        return [int(ids[row, min(len(before), ids.shape[1] - 1)])]

    options = {"do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    result = _generate(model, NEW + 1, prefix_allowed_tokens_fn=forced, **options)
    assert torch.equal(result.sequences[:, :-1], ids)
    return list(result.attentions)


def _generate(model: PreTrainedModel, new: int, **options: Any) -> Any:
    """Of PROMPTS, padded on the left."""
    ids, mask = padded([token_ids(1, length, seed=length)[0] for length in PROMPTS], "left")
    ends = {"eos_token_id": None, "pad_token_id": PAD}
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **ends, **options)


RUNS: dict[str, tuple[Callable[..., Ran], Callable[[PreTrainedModel, Tensor], list[Maps]]]] = {
    "generating": (generating, eager_generating),
    "chunks": (in_chunks, eager_in_chunks),
}
"""By name: how a model runs under capture, and how it runs eagerly over the same ids."""


def reduced(steps: Iterable[Maps], ran: Ran) -> list[AttentionSummary]:
    """The maps of consecutive steps, laid where their rows and columns belong and summed in float64."""
    layers, (batch, tokens) = ran.summaries[0].layers, ran.ids.shape
    heads = ran.summaries[0].diagonal.shape[1]
    whole, stop = np.zeros((len(layers), batch, heads, tokens, tokens)), 0
    for found in steps:
        maps = _with_attention(found, layers)
        start, stop = stop, stop + maps[0].shape[2]
        for layer, one in enumerate(maps):  # (batch, heads, rows, keys)
            columns = min(one.shape[-1], stop)  # a static cache has more, a sliding one fewer
            whole[layer, :, :, start:stop, stop - columns : stop] = one[..., :columns].double().numpy()
    assert stop == tokens
    texts = [whole[:, row, :, start:, start:] for row, start in enumerate(ran.padding)]  # padding's rows hold anything
    return [AttentionSummary(np.diagonal(one, axis1=-2, axis2=-1).copy(), one.sum(axis=-2), layers) for one in texts]


def _with_attention(found: Maps, layers: tuple[int, ...]) -> list[Tensor]:
    maps = [one for one in found if one is not None]
    if len(maps) == len(layers):
        return maps
    return [one for layer in layers if (one := found[layer]) is not None]  # linear attention returns something too


def largest(one: list[AttentionSummary], other: list[AttentionSummary]) -> float:
    """Of the differences."""
    return max(difference(left, right) for left, right in zip(one, other, strict=True))
