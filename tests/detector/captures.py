"""Runs of a model under capture, and how far what was captured is from one forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria

from lapwing_detector.attention import attend
from lapwing_detector.capture import Captured, capture_attention
from lapwing_detector.errors import CaptureError
from tests.detector.tiny_models import (
    EOS,
    FAMILIES,
    LONG,
    PAD,
    captured_forward,
    difference,
    long_model,
    tiny_model,
    token_ids,
)

SAME_MAP = 1e-5
"""Float32: eager attention itself is up to 1.6e-5 from the same model in float64 at 300 tokens, mostly below 1e-5."""

STEP_BY_STEP = 1e-4
"""Projections of one row and of many are summed in another order, and the layers amplify it."""


@pytest.fixture(params=FAMILIES)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """To be named `model` where it is used: a test that asks for it runs with every family."""
    return tiny_model(request.param)


def rounding_error() -> float:
    """Of attending in bfloat16, against the same numbers in float64."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 300, 8, generator=generator).bfloat16() for _ in range(3)]
    counted = torch.ones(1, 300, dtype=torch.bool)
    _, *rough = attend(*inputs, mask=None, first=0, counted=counted, scaling=0.5)
    _, *exact = attend(*(one.double() for one in inputs), mask=None, first=0, counted=counted, scaling=0.5)
    return max(float((one - other).abs().max()) for one, other in zip(rough, exact, strict=True))


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return made


def largest_tensor(tokens: int) -> int:
    query, key, value = (torch.randn(1, 2, tokens, 4) for _ in range(3))
    counted = torch.ones(1, tokens, dtype=torch.bool)
    with LargestTensor() as largest:
        attend(query, key, value, mask=None, first=0, counted=counted, scaling=0.5)
    return largest.elements


def padding_error(model: PreTrainedModel, side: str, whole_mask: bool = False) -> float:
    """With `whole_mask` the mask is given as (batch, 1, rows, columns) bool."""
    lengths = (40, 23, 1, 131)
    ids, mask = padded([token_ids(1, n, seed=n)[0] for n in lengths], side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if whole_mask:
        mask = mask.bool()[:, None, None, :] & torch.ones(131, 131, dtype=torch.bool).tril()
    together = captured_forward(model, ids, attention_mask=mask, position_ids=positions)
    alone = [captured_forward(model, token_ids(1, n, seed=n))[0] for n in lengths]
    assert [summary.diagonal.dtype for summary in together] == [np.float32] * 4
    return max(difference(one, other) for one, other in zip(together, alone, strict=True))


def padded(sequences: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PAD, padding_side=side)
    ones = [torch.ones_like(sequence) for sequence in sequences]
    return ids, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


def generated(
    model: PreTrainedModel, prompts: list[torch.Tensor], **options: object
) -> tuple[Captured, torch.Tensor, torch.Tensor]:
    """The capture, the sequences and the prompts' mask."""
    ids, mask = padded(prompts, "left")
    torch.manual_seed(3)
    with capture_attention(model) as captured:
        result = model.generate(ids, attention_mask=mask, max_new_tokens=40, **options)
    return captured, result, mask


def content(row: torch.Tensor, mask: torch.Tensor, eos: tuple[int, ...] = EOS) -> torch.Tensor:
    """A generated row without padding, up to and without the end-of-sequence token behind the prompt."""
    prompt, answer = row[: len(mask)][mask.bool()], row[len(mask) :]
    ends = torch.isin(answer, torch.tensor(eos)).nonzero()
    return torch.cat([prompt, answer[: int(ends[0])] if len(ends) else answer])


def generation_error(model: PreTrainedModel, prompts: list[torch.Tensor], **options: object) -> tuple[float, set[int]]:
    """Largest difference to one forward over the same ids, and the lengths of the answers."""
    captured, result, mask = generated(model, prompts, **options)
    kept = [content(row, row_mask) for row, row_mask in zip(result, mask, strict=True)]
    alone = [captured_forward(model, ids[None])[0] for ids in kept]
    worst = max(difference(one, other) for one, other in zip(captured.summaries(), alone, strict=True))
    return worst, {len(ids) - int(row_mask.sum()) for ids, row_mask in zip(kept, mask, strict=True)}


class EndsAt(StoppingCriteria):
    """Ends a sequence of a batch at certain tokens, which are no end-of-sequence tokens."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


ENDS = tuple(range(12, 18))

SAMPLED_PAD = 86
"""A pad token that the model samples as any other."""


def letters() -> PreTrainedTokenizerFast:
    """Token i is the character of code i + 30."""
    vocabulary = {chr(i + 30) if i > 2 else f"<{i}>": i for i in range(97)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


OTHER_ENDS = {
    "criteria": lambda: {"stopping_criteria": [EndsAt(ENDS)]},
    "strings": lambda: {"stop_strings": [chr(token + 30) for token in ENDS], "tokenizer": letters()},
}


def other_ends_error(ends: str) -> float:
    model, prompts = tiny_model("llama"), [token_ids(1, 9, seed=n)[0] for n in range(4)]
    options = {"eos_token_id": 2, "pad_token_id": SAMPLED_PAD, "do_sample": True, **OTHER_ENDS[ends]()}
    captured, result, _ = generated(model, prompts, **options)
    kept = []
    for row in result:
        last = next((at for at in range(9, len(row)) if int(row[at]) in (2, *ENDS)), len(row) - 1)
        # The token that other criteria end a sequence at is content, an end-of-sequence token is not.
        kept.append(row[: last + int(row[last] != 2)])
    assert len({len(ids) for ids in kept}) > 1
    assert any(SAMPLED_PAD in ids[9:] for ids in kept)
    alone = [captured_forward(model, ids[None])[0] for ids in kept]
    return max(difference(one, other) for one, other in zip(captured.summaries(), alone, strict=True))


def error_with_a_new_cache() -> float:
    model = long_model("longrope")  # it drops its cache at LONG tokens, and all goes through one forward
    prompts = [token_ids(1, 9, seed=n)[0] for n in range(5)]
    captured, result, mask = generated(model, prompts, do_sample=True, eos_token_id=[2, 3])
    lengths = [len(content(row, row_mask, eos=(2, 3))) for row, row_mask in zip(result, mask, strict=True)]
    assert min(lengths) < LONG < max(lengths)
    visible = (torch.arange(result.shape[1]) < torch.tensor(lengths)[:, None]).long()
    together = captured_forward(model, result, attention_mask=visible)
    return max(difference(one, other) for one, other in zip(captured.summaries(), together, strict=True))


def require_nothing(captured: Captured) -> None:
    """No number came out."""
    with pytest.raises(CaptureError):
        captured.summaries()
