"""Models and tokenizers from a path, a Hub id or nothing; remote code is never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lapwing_detector import embedded
from lapwing_detector.errors import InvalidInput, UnsupportedModel


def load_model(
    source: str | Path | None, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode and its tokenizer.

    Args:
        source: Hub id or directory; None for the embedded Atlas.
        dtype: of the weights; as they are stored without it, but float32 for float16 weights on a CPU.
        device: where to; the CPU without it.

    Raises:
        InvalidInput: there is no such model.
        UnsupportedModel: its configuration asks for code of its own to be run.
    """
    place = str(embedded.model_path() if source is None else source)
    refuse_remote_code(place)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype or "auto")
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(
            "model", f"{place!r} can't be loaded as a causal language model: {str(error).splitlines()[0][:300]}"
        ) from error
    target = torch.device(device or "cpu")
    if dtype is None and model.dtype == torch.float16 and target.type == "cpu":
        model = model.float()
    return model.to(target).eval(), tokenizer


def refuse_remote_code(place: str) -> None:
    """Stops before a model directory whose configuration names code of its own (`auto_map`)."""
    config = Path(place) / "config.json"
    if not config.is_file():
        return
    try:
        described = json.loads(config.read_text())
    except ValueError as error:
        raise InvalidInput("model", f"{config} is no JSON: {error}") from error
    if isinstance(described, dict) and "auto_map" in described:
        raise UnsupportedModel(
            f"{place} asks to run code of its own (auto_map in config.json), which is never done; "
            "use a model that transformers knows by itself"
        )


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Most tokens of a sequence that the model was made for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Tokenizers that know no limit say 1e30.
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit < 1 << 30]
    return int(min(limits, default=1 << 20))
