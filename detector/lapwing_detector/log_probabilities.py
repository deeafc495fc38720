"""Log-probabilities of the tokens of responses, from the very forward that gives their attention. Knows no probe.

The logits of all positions are never held at once: with a large vocabulary they would be the largest tensor of all. The
output head is shown the last position only, and then some positions at a time of what it would have been shown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lapwing_detector.language_model import LanguageModel
from lapwing_detector.rotary import switching_points
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.tokens import TokenIds

LogProbabilities = NDArray[np.float32]
"""(response tokens,) natural logarithms, of the model's own distribution (temperature 1). Where nothing stands before
the response its first token has none."""

MOST_LOGITS = 1 << 24
"""Logits that are held at once, 64 MiB of them in float32."""

SAME = 4.0
"""So many rounding errors of the largest the logits of the same states may lie apart."""


def read_with_log_probabilities(
    loaded: LanguageModel, sequences: Sequence[TokenIds], heads: Mapping[int, Collection[int]] | None = None
) -> list[tuple[AttentionSummary, LogProbabilities]]:
    """Attention and log-probabilities of sequences, read in one forward, padded on the right.

    Args:
        loaded: the model.
        sequences: prompts and responses.
        heads: as for `LanguageModel.summaries`.

    Returns:
        One of each for every sequence; NaN where the model's logits are.
    """
    if not sequences:
        return []
    if len(sequences) > 1 and switching_points(loaded.model.config.get_text_config()):
        # In a batch all would have the frequencies of the longest.
        return [one for ids in sequences for one in read_with_log_probabilities(loaded, [ids], heads)]
    texts = [ids.all for ids in sequences]
    longest = max(map(len, texts))
    rows = loaded.tensor([[*ids, *[loaded.pad_id] * (longest - len(ids))] for ids in texts])
    visible = loaded.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts])
    with loaded.capture(heads) as captured, torch.inference_mode():
        try:
            states = States(loaded.model, rows, visible)
            summaries = captured.summaries()
        finally:
            captured.forget()
    return list(zip(summaries, states.log_probabilities(sequences), strict=True))


class States:
    """What the output head of a model is shown of a padded batch."""

    def __init__(self, model: PreTrainedModel, rows: Tensor, visible: Tensor) -> None:
        """Runs the model once.

        Args:
            model: in eval mode.
            rows: (batch, tokens) ids, padded on the right.
            visible: (batch, tokens) 0 for padding.
        """
        self._model, self._rows, self._visible = model, rows, visible
        self._shown: Tensor | None = None
        self._head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        hook = self._head.register_forward_pre_hook(self._trim) if self._head is not None else None
        try:
            self._own = self._forward()  # (batch, 1, vocabulary), or of all positions where nothing was trimmed
        finally:
            if hook is not None:
                hook.remove()

    @torch.inference_mode()
    def log_probabilities(self, sequences: Sequence[TokenIds]) -> list[LogProbabilities]:
        """Of the responses in the rows of the batch."""
        places = [(max(len(ids.prompt_ids), 1) - 1, len(ids.all) - 1) for ids in sequences]
        where = [[row, place] for row, (first, end) in enumerate(places) for place in range(first, end)]
        if not where:
            return [np.empty(0, np.float32) for _ in sequences]
        row, place = torch.tensor(where, device=self._rows.device).T  # (response tokens,) each
        found = torch.cat(list(self._chosen(row, place, self._rows[row, place + 1]))).float().cpu().numpy()
        ends = np.cumsum([end - first if end > first else 0 for first, end in places])
        return np.split(found, ends[:-1])

    def _chosen(self, row: Tensor, place: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Log-probabilities of the targets, block by block; all (response tokens,)."""
        logits_at, size = self._logits(), max(1, MOST_LOGITS // self._own.shape[-1])
        for start in range(0, len(row), size):
            block = slice(start, start + size)
            logits = logits_at(row[block], place[block]).float()  # (block, vocabulary)
            # Less the largest first: of a sure token the difference would have the rounding error of the logits.
            logits = logits - logits.amax(dim=-1, keepdim=True)
            chosen = logits.gather(1, targets[block, None].to(logits.device))[:, 0]
            yield chosen - logits.logsumexp(dim=-1)

    def _logits(self) -> Callable[[Tensor, Tensor], Tensor]:
        """From rows and places to (places, vocabulary)."""
        shown, head = self._shown, self._head
        if shown is not None:
            finish = finishing(head(shown[:, -1:]), self._own, self._model.config.get_text_config())
            if finish is not None:
                return lambda row, place: finish(head(shown[row, place]))
        # The model does more after its head than is known here, or has none that shows what it is given.
        own = self._own if shown is None else self._forward()
        return lambda row, place: own[row, place]

    def _forward(self) -> Tensor:
        output = self._model(input_ids=self._rows, attention_mask=self._visible, use_cache=False)
        logits: Tensor = output.logits
        return logits

    def _trim(self, head: Any, shown: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The last position in place of all; keeps them. Nothing else than a batch of positions is trimmed."""
        if len(shown) != 1 or shown[0].shape[:2] != self._rows.shape:
            return None
        self._shown = shown[0]
        return (shown[0][:, -1:],)


def finishing(raw: Tensor, own: Tensor, config: Any) -> Callable[[Tensor], Tensor] | None:
    """What a model does to the logits of its head: nothing, a factor, or a soft cap.

    Args:
        raw: (..., vocabulary) of the head.
        own: of the model, from the same states.
        config: of the model, which names a cap.

    Returns:
        The same for other states; None where it is none of these.
    """
    wide, wanted = raw.float(), own.float().to(raw.device)
    factor = float((wide * wanted).sum() / (wide * wide).sum().clamp(min=1e-30))
    ways: list[Callable[[Tensor], Tensor]] = [lambda logits: logits, lambda logits: logits * factor]
    caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")]
    for cap in filter(None, caps):
        ways.append(lambda logits, cap=cap: torch.tanh(logits / cap) * cap)  # type: ignore[misc]
    apart = [float((way(wide) - wanted).abs().max()) for way in ways]
    nearest = min(range(len(ways)), key=lambda number: apart[number])
    return ways[nearest] if apart[nearest] <= SAME * torch.finfo(raw.dtype).eps * float(wanted.abs().max()) else None
