"""The answers that a probe is most wrong about, by held-out scores, with their texts and the shares of their tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.evaluation.nested import Trial
from lapwing_training.statistics.significance import Floats

if TYPE_CHECKING:
    from lapwing_detector.language_model import LanguageModel
    from lapwing_detector.probe import Probe

MOST = 10
"""Examples of either side."""

LONGEST_TEXT, LONGEST_TOKENS = 4000, 400
"""Characters and tokens that are kept of one: the manifest is read whole."""


def worst_examples(
    trial: Trial, items: Mapping[str, LabelledGeneration], probe: Probe, language_model: LanguageModel | None = None
) -> dict[str, list[dict[str, Any]]]:
    """The made-up answers with the lowest held-out probabilities, and the others with the highest.

    Args:
        trial: rows that are judged.
        items: texts by id.
        probe: colours the tokens; in nested cross-validation it was fitted on these rows, too.
        language_model: reads them; without it tokens are null.

    Returns:
        JSON values.
    """
    rows = worst_rows(trial.probabilities, trial.logits, trial.tested.labels)
    return {
        side: [_example(trial, row, items[str(trial.tested.ids[row])], probe, language_model) for row in of_side]
        for side, of_side in rows.items()
    }


def worst_rows(probabilities: Floats, logits: Floats, labels: NDArray[Any]) -> dict[str, list[int]]:
    """The most wrong rows of either side, the worst first; equal probabilities are told apart by their logits.

    Args:
        probabilities: (rows,)
        logits: (rows,)
        labels: (rows,)
    """
    rising = np.lexsort((logits, probabilities))
    return {
        "missed": rising[labels[rising] == 1][:MOST].tolist(),
        "false_alarms": rising[::-1][labels[rising[::-1]] == 0][:MOST].tolist(),
    }


def _example(
    trial: Trial, row: int, item: LabelledGeneration, probe: Probe, language_model: LanguageModel | None
) -> dict[str, Any]:
    tokens, contributions = (None, None) if language_model is None else _coloured(item, probe, language_model)
    return {
        "id": item.id,
        "prompt": _shortened(_prompt(item)),
        "response": _shortened(item.response),
        "label": int(trial.tested.labels[row]),
        "probability": float(trial.probabilities[row]),
        "tokens": tokens,
        "contributions": contributions,
    }


def _coloured(
    item: LabelledGeneration, probe: Probe, language_model: LanguageModel
) -> tuple[list[str] | None, list[float] | None]:
    """The last tokens of prompt and response with their shares in the logit; none where it can't be scored."""
    from lapwing_detector.log_probabilities import read_with_log_probabilities
    from lapwing_training.store.work import token_ids_of

    ids = token_ids_of(item, language_model)
    if not ids.response_ids or len(ids.all) < probe.needed_tokens:
        return None, None
    [(summary, said)] = read_with_log_probabilities(language_model, [ids], probe.heads or None)
    logit, share = probe.score(summary, said)
    if not math.isfinite(logit):
        return None, None
    tokens = [str(language_model.tokenizer.decode([token])) for token in ids.all[-LONGEST_TOKENS:]]
    return tokens, [round(one, 6) for one in share.tokens[-LONGEST_TOKENS:].astype(np.float64).tolist()]


def _prompt(item: LabelledGeneration) -> str:
    if item.messages is None:
        return item.prompt or ""
    return "\n".join(f"{message['role']}: {message['content']}" for message in item.messages)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"
