"""How far the server is, and what it has by then."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from grpc import StatusCode

from lapwing_server.engine import Loaded
from lapwing_server.limits import Limits
from lapwing_server.refusal import Refusal
from lapwing_server.shelf import Shelf

LOADING: Final = "model and probe are being loaded"


class Phase(StrEnum):
    """The phases of a server's life."""

    LOADING = "LOADING"
    SERVING = "SERVING"
    FAILED = "FAILED"
    STOPPING = "STOPPING"


@dataclass
class Readiness:
    """What the servicers share; changed only on the event loop."""

    limits: Limits = field(default_factory=Limits)
    phase: Phase = Phase.LOADING
    message: str = LOADING
    """Why it is not serving; empty when it is."""

    _loaded: Loaded | None = None

    def succeed(self, loaded: Loaded) -> None:
        """Model and probe are there and warm."""
        self._loaded, self.phase, self.message = loaded, Phase.SERVING, ""

    def swap(self, shelf: Shelf) -> None:
        """Other probes from now on; whoever has what was loaded before keeps it until they are done."""
        self._loaded = replace(self.loaded, shelf=shelf)

    def begin_again(self) -> bool:
        """Loads once more if nothing could be loaded; whether that is so."""
        if self.phase is not Phase.FAILED or self._loaded is not None:
            return False
        self.phase, self.message = Phase.LOADING, LOADING
        return True

    def fail(self, message: str) -> None:
        """Model or probe could not be loaded."""
        self.phase, self.message = Phase.FAILED, message

    def broken(self, message: str) -> None:
        """It serves no longer, though what was loaded is still there and is tried."""
        if self.phase in (Phase.SERVING, Phase.FAILED):
            self.fail(message)

    def mended(self) -> None:
        """It serves again, if it was broken."""
        if self.phase is Phase.FAILED and self._loaded is not None:
            self.phase, self.message = Phase.SERVING, ""

    def stop(self) -> None:
        """The server goes; what runs may finish."""
        self.phase, self.message = Phase.STOPPING, "the server is shutting down"

    @property
    def loaded_or_none(self) -> Loaded | None:
        """What is loaded; None as long as nothing could be."""
        return self._loaded

    @property
    def loaded(self) -> Loaded:
        """What is loaded.

        Raises:
            Refusal: nothing is, so far or at all.
        """
        if self._loaded is None:
            raise Refusal(StatusCode.UNAVAILABLE, f"SERVER_{self.phase.value}", f"not serving: {self.message}")
        return self._loaded
