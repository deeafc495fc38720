"""A log in memory, as `lapwing serve` would write it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from service_fakes import WAIT

from lapwing_server import logs


class Written:
    """Takes the place of whatever log was configured before."""

    def __init__(self, level: str = "info", style: str = "json", stream: io.StringIO | None = None) -> None:
        self._stream = stream or io.StringIO()
        self.handler = logs.configure(level, style, self._stream)

    @property
    def text(self) -> str:
        """All that was logged so far."""
        assert self.handler.wait(WAIT)
        return self._stream.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


@contextmanager
def logging_as_before() -> Iterator[None]:
    """Inside, logging may be configured; afterwards it is as it was."""
    root, ours = logging.getLogger(), logging.getLogger("lapwing")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
        logging.captureWarnings(False)
