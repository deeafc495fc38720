"""The one family of errors that training raises; a message holds the name, the value, the expectation and the mend."""

from __future__ import annotations


class TrainingError(Exception):
    """Base of everything that training refuses."""


class InvalidData(TrainingError, ValueError):
    """A file of questions or generations that can't be worked with.

    Attributes:
        line: number of the offending line, from 1; None when the whole file is meant.
    """

    def __init__(self, path: object, line: int | None, message: str) -> None:
        where = f"{path}" if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: {message}")
        self.line = line


class InvalidOption(TrainingError, ValueError):
    """An option whose value makes no sense, alone or with the others."""


class NotEnoughData(TrainingError, ValueError):
    """Too few rows, groups or classes for an honest fit."""


class NonFiniteFeatures(TrainingError, ValueError):
    """Features that hold NaN or infinity."""


class NonFiniteLogits(TrainingError, ValueError):
    """A model whose own logits are NaN or infinite, so that what it wrote means nothing."""


class StoreMismatch(TrainingError):
    """A feature store that was made from other items, by another model or with other features."""


class StoreCorrupt(TrainingError):
    """A feature store that is damaged, unfinished or not one of ours."""


class ModelMismatch(TrainingError):
    """A probe and a feature store that come from different models."""
