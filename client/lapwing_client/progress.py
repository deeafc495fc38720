"""How far a long piece of work is, on standard error; nothing is said of a short one."""

from __future__ import annotations

import sys
import time
from collections.abc import Sized
from typing import Any

QUIET_SECONDS = 2.0
"""Nothing is said of what is done by then."""

LINE_SECONDS = 10.0
"""Between two lines, where no bar can be drawn."""


class Progress:
    """Counts what is done: a bar on a terminal, now and then a line in a file or a notebook.

    Args:
        items: what is worked on; where it has a length, the bar has an end.
        shown: whether anything is ever said.
    """

    def __init__(self, items: object, shown: bool) -> None:
        self._total = len(items) if isinstance(items, Sized) else None
        self._shown = shown
        self._done = 0
        self._begun = self._said = time.monotonic()
        self._bar: Any = None

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if not self._shown or (now := time.monotonic()) - self._begun < QUIET_SECONDS:
            return
        if sys.stderr.isatty():
            self._draw()
        elif self._said == self._begun or now - self._said >= LINE_SECONDS:
            self._said = now
            of = "" if self._total is None else f" of {self._total}"
            print(f"{self._done}{of} scored", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        if self._bar is None:
            columns = (TextColumn("scored"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=self._done)
