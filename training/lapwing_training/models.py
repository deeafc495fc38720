"""A loaded model and its tokenizer, as generating and extracting need them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lapwing_training.errors import InvalidData, InvalidOption
from lapwing_training.generations import Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lapwing_detector.tokens import TokenIds

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, ready to be run."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

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

    def ids(self, question: Question, response: str | None = None) -> TokenIds:
        """Prompt and response as token ids.

        Raises:
            InvalidData: the item's text can't be tokenised as it stands.
        """
        from lapwing_detector.errors import InvalidInput
        from lapwing_detector.tokens import build_ids

        prompt = list(question.messages) if question.messages else question.prompt or ""
        try:
            return build_ids(self.tokenizer, prompt, response)
        except InvalidInput as error:
            raise InvalidData(f"item `{question.id}`", None, str(error)) from error

    @property
    def most_tokens(self) -> int:
        """Context length."""
        from lapwing_detector.loading import context_length

        return context_length(self.model, self.tokenizer)


def load(name: str | None = None, dtype: str | None = None, device: str | None = None) -> LoadedModel:
    """A model by Hub id or path; the embedded Atlas without a name.

    Raises:
        InvalidOption: an unknown dtype.
        DetectorError: there is no such model, or it asks to run code of its own.
    """
    import torch

    from lapwing_detector.loading import load_model

    if dtype is not None and dtype not in DTYPES:
        raise InvalidOption(f"dtype is `{dtype}`; expected {', '.join(DTYPES)}")
    model, tokenizer = load_model(name, dtype=getattr(torch, dtype) if dtype else None, device=device)
    return LoadedModel(model, tokenizer, name or "atlas")
