"""Which token ids the model reads for which item, in which order, and which items it does not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lapwing_detector.errors import InvalidInput
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.tokens import TokenIds, build_ids
from lapwing_training.data.generations import LabelledGeneration, Question
from lapwing_training.errors import InvalidData, NotEnoughData
from lapwing_training.progress import waiting
from lapwing_training.store.prefix import response_cut


@dataclass(frozen=True)
class Length:
    """How long a text must be and may be."""

    k: int
    needed: int
    """Least number of tokens of a text that has all features with this k."""

    most: int
    """Tokens that the model was made for."""

    def against(self, tokens: int) -> str | None:
        """Why a text of so many tokens has no features; None where it has."""
        if tokens < self.needed:
            return f"{tokens} tokens; k = {self.k} needs at least {self.needed}"
        return f"{tokens} tokens; the model reads at most {self.most}" if tokens > self.most else None


@dataclass(frozen=True)
class Work:
    """What is read; the same items give the same work."""

    tokens: Mapping[str, TokenIds]
    """By id, of the items that are read."""

    left_out: Mapping[str, str]
    """Reason by id."""

    length: Length

    def read(self, fraction: float = 1.0) -> dict[str, TokenIds]:
        """What is read of each item whose text, cut at this fraction of the response, is long enough.

        Shortest first, so that a batch holds little padding.
        """
        cut = {
            id: TokenIds(ids.prompt_ids, ids.response_ids[: response_cut(fraction, len(ids.response_ids))])
            for id, ids in self.tokens.items()
        }
        kept = {id: ids for id, ids in cut.items() if self.length.against(len(ids.all)) is None}
        return dict(sorted(kept.items(), key=lambda entry: len(entry[1].all)))


def plan_work(generations: Sequence[LabelledGeneration], loaded: LanguageModel, length: Length) -> Work:
    """Token ids of every item that has all features, and why the others have not.

    Raises:
        InvalidData: an id that is used twice, or token ids outside the model's vocabulary.
        NotEnoughData: none has all features.
    """
    require_unique(generations)
    kept: dict[str, TokenIds] = {}
    left_out: dict[str, str] = {}
    for item in waiting(generations):
        ids = token_ids_of(item, loaded)
        reason = length.against(len(ids.all))
        if reason is None:
            kept[item.id] = ids
        else:
            left_out[item.id] = reason
    if not kept:
        reason = next(iter(left_out.values()), "nothing")
        raise NotEnoughData(f"none of {len(generations)} items can be stored, the first because of {reason}; lower --k")
    return Work(kept, left_out, length)


def require_unique(items: Sequence[Question]) -> None:
    """Every item has an id of its own.

    Raises:
        InvalidData: two have the same.
    """
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise InvalidData(f"item `{item.id}`", None, "its id is used twice; ids are unique: rename one of them")
        seen.add(item.id)


def is_own(item: LabelledGeneration, loaded: LanguageModel) -> bool:
    """Whether the ids that the item kept, if it did, are of this model's tokenizer."""
    return loaded.identity.tokenizer.startswith(str(item.generation.get("tokenizer", "")))


def token_ids_of(item: LabelledGeneration, loaded: LanguageModel) -> TokenIds:
    """Prompt and response as ids: those that were kept while generating, or else made from the text.

    Kept ids are passed over when `generation.tokenizer` says that another tokenizer made them.

    Raises:
        InvalidData: ids outside the model's vocabulary, or more of a prompt than there are ids.
    """
    kept = item.generation.get("token_ids")
    if kept is None or not is_own(item, loaded):
        return ids_of(item, loaded, item.response)
    known = range(loaded.vocabulary)
    wrong = [id for id in kept if type(id) is not int or id not in known] if isinstance(kept, list) else [kept]
    if wrong:
        raise InvalidData(
            f"item `{item.id}`",
            None,
            f"generation.token_ids holds {wrong[0]!r}; expected a list of ids from 0 to {known[-1]}: drop the ids of "
            "another model, then the text is used",
        )
    prompt = _prompt_tokens(item, loaded, len(kept))
    return TokenIds(tuple(kept[:prompt]), tuple(kept[prompt:]))


def ids_of(question: Question, loaded: LanguageModel, response: str | None = None) -> TokenIds:
    """Prompt and response as token ids.

    Raises:
        InvalidData: the item's text can't be tokenised as it stands.
    """
    prompt = list(question.messages) if question.messages else question.prompt or ""
    try:
        return build_ids(loaded.tokenizer, prompt, response)
    except InvalidInput as error:
        raise InvalidData(f"item `{question.id}`", None, str(error)) from error


def prompt_ids_of(question: Question, loaded: LanguageModel, new_tokens: int) -> tuple[int, ...]:
    """The prompt as token ids, with room for an answer of so many tokens.

    Raises:
        InvalidData: the prompt is empty, can't be tokenised or is too long.
    """
    ids = ids_of(question, loaded).prompt_ids
    if len(ids) + new_tokens > loaded.max_tokens:
        raise InvalidData(
            f"item `{question.id}`",
            None,
            f"the prompt has {len(ids)} tokens and its answer up to {new_tokens}, {loaded.name} reads at most "
            f"{loaded.max_tokens} together; shorten the prompt, leave it out or lower --max-new-tokens",
        )
    return ids


def _prompt_tokens(item: LabelledGeneration, loaded: LanguageModel, most: int) -> int:
    """How many of the kept ids are the prompt's: as was kept, too, or as many as its text has."""
    kept = item.generation.get("prompt_tokens")
    if kept is None:
        return min(len(ids_of(item, loaded, item.response).prompt_ids), most)
    if type(kept) is not int or not 0 <= kept <= most:
        raise InvalidData(
            f"item `{item.id}`",
            None,
            f"generation.prompt_tokens is {str(kept)[:40]}; expected 0 to {most}, of the {most} in token_ids",
        )
    return kept
