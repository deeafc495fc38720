"""A causal language model with its tokenizer: from a path, a Hub id or nothing. Remote code is never run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lapwing_detector import embedded
from lapwing_detector.capture import Captured, capture_attention
from lapwing_detector.errors import InvalidInput, UnsupportedModel
from lapwing_detector.identity import ModelIdentity, identity_of
from lapwing_detector.rotary import switching_points
from lapwing_detector.summary import AttentionSummary
from lapwing_detector.tokens import opening_of

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
NO_LIMIT = 1 << 20
"""Context length where neither the configuration nor the tokenizer names one."""

PLACES = frozenset({"attention_mask", "position_ids"})
"""Parameters of a forward by which a padded batch says where each token is."""

MOST_CAPTURES = 16
"""Sets of heads whose captures are kept."""


@dataclass(frozen=True)
class LanguageModel:
    """A model in eval mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = ""
    """Hub id, or the name of its folder; never a whole path."""

    def __post_init__(self) -> None:
        if self.model.training:
            raise InvalidInput("model", "is in training mode, where dropout makes it random; call model.eval()")

    @classmethod
    def load(
        cls, source: str | Path | None = None, *, dtype: str | None = None, device: str | torch.device | None = None
    ) -> LanguageModel:
        """Loads a model and its tokenizer.

        Args:
            source: Hub id or directory; the embedded Atlas without it.
            dtype: `float32`, `bfloat16` or `float16`; as stored without it, but float32 for float16 on a CPU.
            device: where to; the CPU without it.

        Raises:
            InvalidInput: there is no such model, or no such dtype.
            UnsupportedModel: its configuration asks for code of its own to be run.
        """
        place = str(embedded.model_path() if source is None else source)
        if dtype is not None and dtype not in DTYPES:
            raise InvalidInput("dtype", f"is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        if Path(place).is_absolute() and not Path(place).exists():
            raise InvalidInput(
                "model",
                f"{place!r} can't be loaded as a causal language model: there is no such directory; give one, or the "
                "id of a model on the Hub",
            )
        refuse_remote_code(place)
        try:
            target = torch.device(device or "cpu")
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, dtype=DTYPES[dtype] if dtype else "auto", trust_remote_code=False, output_loading_info=True
            )
            model, info = loaded
            if dtype is None and model.dtype == torch.float16 and target.type == "cpu":
                model = model.float()
            model = model.to(target).eval()
        except MemoryError:
            raise
        except Exception as error:  # the files may hold anything, and packages that they need may not be here
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise InvalidInput("model", f"{place!r} can't be loaded as a causal language model: {said}") from error
        if info["missing_keys"]:
            raise InvalidInput(
                "model",
                f"{place!r} lacks {len(info['missing_keys'])} of its weights, such as {min(info['missing_keys'])}; "
                "they would be random: fetch the whole model again",
            )
        name = "atlas" if source is None else Path(place).resolve().name if Path(place).is_dir() else place
        return cls(model, tokenizer, name)

    @cached_property
    def identity(self) -> ModelIdentity:
        """Which model it is, for probes."""
        return identity_of(self.model, self.tokenizer, self.name)

    @cached_property
    def max_tokens(self) -> int:
        """Context length: most tokens of a sequence that the model was made for."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        # Tokenizers that know no limit say 1e30.
        limits = [limit for limit in (positions, self.tokenizer.model_max_length) if limit and limit < 1 << 30]
        return int(min(limits, default=NO_LIMIT))

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens that end an answer: of the model's generation settings and of its tokenizer."""
        settings = getattr(self.model.generation_config, "eos_token_id", None)
        listed = settings if isinstance(settings, list) else [settings]
        return frozenset(int(token) for token in (*listed, self.tokenizer.eos_token_id) if token is not None)

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """What the tokenizer puts in front of a text."""
        return opening_of(self.tokenizer)

    @property
    def pad_id(self) -> int:
        """What fills a batch; masked, so any token will do."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model knows."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.weight.shape[0])

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        """The model's forward with the logits of the last position only, where the model can leave out the others."""
        if "logits_to_keep" in self.parameters:
            inputs["logits_to_keep"] = 1  # a large vocabulary makes them the largest tensor of all
        return self.model(input_ids=input_ids, **inputs)

    def summaries(
        self, sequences: Sequence[Sequence[int]], heads: Mapping[int, Collection[int]] | None = None
    ) -> list[AttentionSummary]:
        """Attention of token id sequences, read in one forward, padded on the right.

        Args:
            sequences: token ids.
            heads: layer index -> the heads that are needed; all without it. See `capture_attention`.
        """
        if not sequences:
            return []
        if len(sequences) > 1 and switching_points(self.model.config.get_text_config()):
            # In a batch all would have the frequencies of the longest.
            return [summary for ids in sequences for summary in self.summaries([ids], heads)]
        longest = max(len(ids) for ids in sequences)
        rows = [[*ids, *[self.pad_id] * (longest - len(ids))] for ids in sequences]
        visible = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences]
        with self.capture(heads) as captured, torch.inference_mode():
            try:
                self.forward(self.tensor(rows), attention_mask=self.tensor(visible), use_cache=False)
                return captured.summaries()
            finally:
                captured.forget()

    def capture(self, heads: Mapping[int, Collection[int]] | None = None) -> Captured:
        """A capture of some heads, the same one whenever these are asked for: to make one walks the whole model.

        Args:
            heads: layer index -> the heads that are needed; all without it.
        """
        key = None if heads is None else tuple((layer, tuple(kept)) for layer, kept in heads.items())
        captures = self._captures
        known = captures.pop(key) if key in captures else capture_attention(self.model, heads=heads)
        captures[key] = known
        while len(captures) > MOST_CAPTURES:
            del captures[next(iter(captures))]  # the one that was not used for the longest time
        return known

    def tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Token ids or a mask on the model's device; (batch, tokens)."""
        return torch.tensor(rows, dtype=torch.long, device=self.model.device)

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own captures, which are tied to the model.
        return {name: value for name, value in self.__dict__.items() if name != "_captures"}

    @cached_property
    def _captures(self) -> dict[Any, Captured]:
        return {}

    @cached_property
    def takes_padding(self) -> bool:
        """Whether sequences of different lengths can go on side by side, padded on the left.

        Runs the model, as some (RoBERTa and its kind) count positions from another number than 0.
        """
        config = self.model.config.get_text_config()
        if switching_points(config) or not self.parameters >= PLACES:
            return False  # in a batch all would have the frequencies of the longest
        padding = {self.pad_id, getattr(config, "pad_token_id", None)}  # which they do not count at all
        ids = self.tensor([[token for token in range(5) if token not in padding]])
        with torch.inference_mode():
            alone = self.forward(ids, use_cache=False).logits
            placed = self.forward(ids, use_cache=False, position_ids=torch.arange(ids.shape[1])[None].to(ids.device))
        return torch.equal(alone, placed.logits)

    @cached_property
    def parameters(self) -> frozenset[str]:
        """What the model's forward can be given."""
        return frozenset(inspect.signature(self.model.forward).parameters)


def refuse_remote_code(place: str) -> None:
    """Stops before a model directory whose configuration names code of its own (`auto_map`).

    transformers would not run it without `trust_remote_code`, but might load something else in its place.
    """
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
