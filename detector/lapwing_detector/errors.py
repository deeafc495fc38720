"""The one family of errors that the detector raises; whoever stands at a boundary translates it there."""

from __future__ import annotations

from collections.abc import Sequence


class DetectorError(Exception):
    """Base of everything that the detector refuses."""


class InvalidInput(DetectorError, ValueError):
    """An argument that can't be worked with.

    Attributes:
        field: path of the argument, such as `prompt` or `response_ids[3]`.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.reason = message


class TooLong(InvalidInput):
    """More tokens than the model or the caller's limit allows."""


class TooShort(DetectorError, ValueError):
    """Fewer tokens than the feature needs: it does not exist, and zeros would be a lie.

    Attributes:
        token_count: tokens of the sequence.
        needed: least number of tokens that has this feature.
    """

    def __init__(self, token_count: int, needed: int) -> None:
        super().__init__(
            f"the sequence has {token_count} tokens, the {needed} largest values need at least {needed}; "
            "score a longer text or fit a probe with a smaller k: lapwing train --k"
        )
        self.token_count = token_count
        self.needed = needed


class UnsupportedModel(DetectorError):
    """A model whose attention can't be captured."""


class UnsupportedGeneration(DetectorError):
    """A way of generating whose attention can't be followed token by token."""


class CaptureError(DetectorError):
    """What was captured would not be the attention of the sequence; nothing is returned."""


class ProbeMismatch(DetectorError):
    """The probe was fitted on another model."""


class ProbeCorrupt(DetectorError):
    """A probe directory that is damaged, incomplete or not one of ours."""


class RegistryError(DetectorError):
    """A registry of probes that can't be read, can't be changed, or does not hold what was asked for."""


class UnknownProbe(RegistryError):
    """A name or revision that the registry does not hold.

    Attributes:
        field: `name` or `revision`, whichever is not known.
        known: names or revisions that there are, some of them if there are many.
    """

    def __init__(self, field: str, message: str, known: Sequence[str] = ()) -> None:
        self.known = tuple(known[:20])
        super().__init__(f"{message}; known are {', '.join(self.known) or 'none'}")
        self.field = field
