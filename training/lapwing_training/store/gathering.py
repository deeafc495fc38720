"""A feature store that fills while answers are generated: a shard for each batch, from the forwards that wrote it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lapwing_detector.capture import Captured, capture_attention
from lapwing_detector.language_model import LanguageModel
from lapwing_detector.log_probabilities import read_with_log_probabilities
from lapwing_detector.rotary import switching_points
from lapwing_training.answers.answering import Answer
from lapwing_training.data.generations import LabelledGeneration
from lapwing_training.errors import StoreCorrupt
from lapwing_training.store.extract import ExtractOptions, Reading, extract_features, shard_of
from lapwing_training.store.plan import open_plan, plan_of
from lapwing_training.store.shards import WHOLE, tokens_digest, whole_shards, write_shard
from lapwing_training.store.store import read_items
from lapwing_training.store.work import token_ids_of

Answers = list[LabelledGeneration]


@dataclass(frozen=True)
class Gathering:
    """Keeps features of what a model writes."""

    directory: Path
    loaded: LanguageModel
    options: ExtractOptions
    captured: Captured

    @classmethod
    def into(cls, directory: Path, loaded: LanguageModel, features: Sequence[str], k: int) -> Gathering:
        """A store that is to be filled; nothing is written yet.

        Raises:
            InvalidOption: no such feature or k.
            UnsupportedModel: the attention of this model can't be captured.
        """
        return cls(directory, loaded, ExtractOptions(tuple(features), k), capture_attention(loaded.model))

    def begin(self, asked: str, answers: Answers, batch_size: int) -> int:
        """Begin, or go on with what the same questions, options and model began.

        Args:
            asked: digest of everything that decides what is written.
            answers: those that an earlier run left.
            batch_size: answers a shard.

        Returns:
            how many of these answers have their features, in whole batches.

        Raises:
            StoreMismatch: the directory was begun with something else.
        """
        plan = plan_of(self.loaded.identity, self.options.features, self.options.k, generated=asked)
        open_plan(self.directory, plan)
        held = {file.number: file.shard.tokens for file in whole_shards(self.directory, WHOLE)}
        starts = range(0, len(answers), batch_size)
        batches = [answers[start : start + batch_size] for start in starts]
        done = 0
        for number, batch in enumerate(batches):
            if held.get(number) != _tokens(batch):
                break
            done += len(batch)
        return done

    def batch(self, number: int, answer: Callable[[], list[Answer]]) -> list[Answer]:
        """Answers of one batch, whose features are kept before they are given back.

        Raises:
            OSError: there is no room.
        """
        answers, readings = self._read_again(answer()) if self._alone else self._while_written(answer)
        items, length = [one.item for one in answers], self.options.length(self.loaded)
        reasons = {item.id: length.against(len(_ids(item))) for item in items}
        left_out = {id: reason for id, reason in reasons.items() if reason is not None}
        shard = shard_of(_tokens(items), readings, self.options, left_out)
        written = write_shard(self.directory, WHOLE, number, shard)
        for stale in self.directory.glob(f"{WHOLE}-{number:05d}-*.safetensors"):
            if stale != written.path:
                stale.unlink()
        return answers

    def finish(self, answers: Sequence[LabelledGeneration]) -> dict[str, Any]:
        """Write the index; the labels, which nobody knows yet, are for `extract_features` to add.

        A store that was finished and labelled before keeps the labels of answers that are still the same.

        Raises:
            NotEnoughData: none of the answers has all features.
        """
        return extract_features(self._labelled_before(answers), self.directory, self.loaded, self.options)

    def _labelled_before(self, answers: Sequence[LabelledGeneration]) -> Answers:
        try:
            held = read_items(self.directory)
        except StoreCorrupt:  # none yet, or an unfinished one
            return list(answers)
        return [self._as_before(answer, held[answer.id]) if answer.id in held else answer for answer in answers]

    def _as_before(self, answer: LabelledGeneration, before: LabelledGeneration) -> LabelledGeneration:
        if token_ids_of(before, self.loaded).all != _ids(answer):
            return answer
        return replace(answer, label=before.label, labelling=before.labelling)

    @property
    def _alone(self) -> bool:
        """Whether each text must be read by itself, since in a batch all have the frequencies of the longest."""
        return bool(switching_points(self.loaded.model.config.get_text_config()))

    def _while_written(self, answer: Callable[[], list[Answer]]) -> tuple[list[Answer], Sequence[Reading]]:
        with self.captured:
            answers, summaries = answer(), self.captured.summaries()
        said = [np.array(one.log_probabilities, np.float32) for one in answers]
        return answers, list(zip(summaries, said, strict=True))

    def _read_again(self, answers: list[Answer]) -> tuple[list[Answer], Sequence[Reading]]:
        texts = [token_ids_of(one.item, self.loaded) for one in answers]
        return answers, read_with_log_probabilities(self.loaded, texts)


def _ids(item: LabelledGeneration) -> tuple[int, ...]:
    return tuple(item.generation["token_ids"])


def _tokens(answers: Sequence[LabelledGeneration]) -> dict[str, str]:
    return {item.id: tokens_digest(_ids(item)) for item in answers}
