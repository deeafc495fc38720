"""How the next token is taken from the logits of a model. Knows no model and no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from lapwing_detector.options import GenerationOptions

Choice = tuple[int, float]
"""A token with its log-probability at temperature 1."""


class Chooser:
    """Takes the likeliest token, or draws one, by one answer's options and seed."""

    def __init__(self, options: GenerationOptions) -> None:
        self.temperature = float(options.temperature)
        # At 1 it would sort the whole vocabulary and leave nothing out.
        self.warper = TopPLogitsWarper(float(options.top_p)) if options.top_p < 1 else None
        self.random = torch.Generator()
        if options.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(options.seed)

    def draw(self, shifted: Tensor) -> int:
        """A token at random.

        Args:
            shifted: (vocabulary,) logits of one position, the largest of them 0: it stays 0, however low the
                temperature is, and the others at worst become -inf.
        """
        scores = shifted.double()[None] / self.temperature  # float32 would make the lowest temperatures 0, and 0/0 NaN
        if self.warper is not None:
            scores = self.warper(torch.empty(1, 0, dtype=torch.long), scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.random))


def choose(choosers: Sequence[Chooser], logits: Tensor) -> list[Choice | Exception]:
    """The next token of several answers.

    Args:
        choosers: one for each answer.
        logits: (answers, vocabulary) of one position.

    Returns:
        One for each answer; where nothing could be drawn the error, which is of that answer alone.
    """
    logits = logits.float()
    tokens = logits.argmax(-1)
    shifted = logits - logits.amax(-1, keepdim=True)
    finite = (~shifted.isnan().any(-1)).tolist()  # where not, the attention is not finite either: the detection says so
    failed: dict[int, Exception] = {}
    for row, chooser in enumerate(choosers):
        if chooser.temperature > 0 and finite[row]:
            try:
                tokens[row] = chooser.draw(shifted[row])
            except Exception as error:
                failed[row] = error
    chosen = shifted.gather(-1, tokens[:, None])[:, 0] - shifted.logsumexp(-1)
    choices = zip(tokens.tolist(), chosen.tolist(), strict=True)
    return [failed.get(row, choice) for row, choice in enumerate(choices)]
