"""The doctor's first look: which layers and heads of a model are captured, and of what kind they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lapwing_detector.doctor.patient import Patient
from lapwing_detector.doctor.verdict import Check
from lapwing_detector.summary import AttentionSummary

REACHES = {"sliding": "sliding_window", "chunked": "attention_chunk_size", "local": "window_size"}
"""By what the name of a kind of layer holds: where its configuration says how many tokens a row sees at most."""


def check_layers(patient: Patient) -> Check:
    """Which layers and heads are captured, and whether all that they give is finite.

    Raises:
        UnsupportedModel: nothing can be captured.
    """
    captured = patient.capture()
    with torch.inference_mode(), captured:
        patient.language_model.forward(patient.tokens(len(patient.ids)), use_cache=False)
    [summary] = captured.summaries()
    model, heads = patient.model, captured.sums.heads
    kinds, seen = layer_kinds(model), reaches(model)
    layers = [
        {"index": index, "kind": kind, "captured": index in heads, "heads": heads.get(index, 0)}
        for index, kind in enumerate(kinds)
    ]
    by = "eager fallback" if patient.makes_maps else "attention interface"
    said = (
        f"{len(heads)} of {len(kinds)} captured ({spans(summary.layers)}), {summary.diagonal.shape[1]} heads each, "
        f"by the {by}; {in_words(kinds, seen)}"
    )
    odd = not_finite(summary)
    if odd:
        said = f"the attention of layers {spans(odd)} is not finite, try another --dtype; {said}"
    numbers = {"layers": layers, "by": by, "reaches": seen, "not_finite": odd}
    return Check("layers", "failed" if odd else "ok", said, numbers)


def not_finite(summary: AttentionSummary) -> list[int]:
    """Indices of the layers that gave something else than finite numbers."""
    fine = np.isfinite(summary.diagonal) & np.isfinite(summary.received)
    return [index for index, one in zip(summary.layers, fine, strict=True) if not one.all()]


def layer_kinds(model: PreTrainedModel) -> list[str]:
    """Of every layer, as its configuration calls it."""
    config: Any = model.config.get_text_config(decoder=True)
    for name in ("layer_types", "layers_block_type", "attention_layers"):
        named = getattr(config, name, None)
        if named:
            return list(named)
    kind = "full_attention"
    if getattr(config, "sliding_window", None) is not None:
        kind = "sliding_attention"
    elif getattr(config, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    return [kind] * int(config.num_hidden_layers)


def reaches(model: PreTrainedModel) -> dict[str, int]:
    """Tokens that a row sees at most, by the kinds of layers that see a window or a chunk only."""
    config: Any = model.config.get_text_config(decoder=True)
    found = {
        kind: getattr(config, name, None)
        for kind in layer_kinds(model)
        for part, name in REACHES.items()
        if part in kind
    }
    return {kind: int(reach) for kind, reach in found.items() if reach is not None}


def noun(kind: str) -> str:
    """What ends the sight of a row in layers of this kind."""
    return "chunk" if "chunked" in kind else "window"


def in_words(kinds: Sequence[str], seen: Mapping[str, int]) -> str:
    """How many layers are of which kind, and which if there are several."""
    parts = []
    for kind, count in Counter(kinds).items():
        name = kind.replace("_", " ") + (f" of {seen[kind]:,}" if kind in seen else "")
        where = "" if count == len(kinds) else f" ({spans(i for i, one in enumerate(kinds) if one == kind)})"
        parts.append(f"all {name}" if count == len(kinds) else f"{count} {name}{where}")
    return ", ".join(parts)


def spans(indices: Iterable[int]) -> str:
    """Ascending numbers, shortened where they follow each other: `0-2, 5`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
