"""The answers that a probe is most wrong about, by held-out scores, with their texts and the shares of their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lapwing_training.generations import LabelledGeneration
from lapwing_training.nested import Trial
from lapwing_training.significance import Floats

if TYPE_CHECKING:
    from lapwing_detector.detector import Detector

MOST = 10
"""Examples of either side."""

LONGEST_TEXT, LONGEST_TOKENS = 4000, 400
"""Characters and tokens that are kept of one: the manifest is read whole."""


def worst_examples(
    trial: Trial, items: Mapping[str, LabelledGeneration], detector: Detector | None = None
) -> dict[str, list[dict[str, Any]]]:
    """The made-up answers with the lowest held-out probabilities, and the others with the highest.

    Args:
        trial: rows that are judged.
        items: texts by id.
        detector: colours the tokens by the saved probe, which in nested cross-validation was fitted on these rows, too;
            without it tokens are null.

    Returns:
        JSON values.
    """
    rows = worst_rows(trial.probabilities, trial.logits, trial.tested.labels)
    return {
        side: [_example(trial, row, items[str(trial.tested.ids[row])], detector) for row in of_side]
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


def _example(trial: Trial, row: int, item: LabelledGeneration, detector: Detector | None) -> dict[str, Any]:
    tokens, contributions = (None, None) if detector is None else _coloured(item, detector)
    return {
        "id": item.id,
        "prompt": _shortened(_prompt(item)),
        "response": _shortened(item.response),
        "label": int(trial.tested.labels[row]),
        "probability": float(trial.probabilities[row]),
        "tokens": tokens,
        "contributions": contributions,
    }


def _coloured(item: LabelledGeneration, detector: Detector) -> tuple[list[str] | None, list[float] | None]:
    """The last tokens of prompt and response with their shares in the logit; none where it can't be scored."""
    from lapwing_training.work import token_ids_of

    ids = token_ids_of(item, detector.language_model)
    found = detector.score(ids.prompt_ids, ids.response_ids)
    if found.logit is None:
        return None, None
    decode = detector.tokenizer.decode
    tokens = [str(decode([token])) for token in found.token_ids[-LONGEST_TOKENS:]]
    shares = found.token_contributions[-LONGEST_TOKENS:]
    return tokens, [round(share, 6) for share in shares.astype(np.float64).tolist()]


def _prompt(item: LabelledGeneration) -> str:
    if item.messages is None:
        return item.prompt or ""
    return "\n".join(f"{message['role']}: {message['content']}" for message in item.messages)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"
