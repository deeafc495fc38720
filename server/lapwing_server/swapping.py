"""Another shelf while the server serves: read in a thread of its own, and swapped in by one step of the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from lapwing_detector.errors import DetectorError, ProbeCorrupt, ProbeMismatch
from lapwing_detector.head_map import escaped
from lapwing_detector.probe import Probe
from lapwing_server.engine import Loaded
from lapwing_server.readiness import Readiness
from lapwing_server.shelf import LONGEST_REASON, Rejected, Shelf, Shelved
from lapwing_server.shelving import activated, resolved, shelve
from lapwing_server.worker import Worker

log = logging.getLogger("lapwing.server")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Activated:
    """What an activation changed."""

    shelf: Shelf
    before: Probe


class Swapper:
    """Changes the shelf, one change at a time.

    A change that began is finished, whether or not whoever asked for it is still there: else a registry could say
    something that this server does not do. One whose turn had not come when they left never begins.
    """

    def __init__(
        self, readiness: Readiness, load_again: Callable[[], Awaitable[Loaded]], told: Callable[[Shelf], None]
    ) -> None:
        self._readiness = readiness
        self._load_again = load_again
        self._told = told
        self._worker = Worker("lapwing-librarian")
        self._one = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()

    async def reload(self) -> Shelf:
        """The shelf as its directory says now; where the server could load nothing, it tries to load everything.

        Raises:
            RegistryError: the registry can't be read; the shelf stays as it was.
            Refusal: nothing is loaded.
        """
        return await self._finish(self._reload)

    async def activate(self, name: str, revision: str | None) -> Activated:
        """Another active probe; raises what `shelving.activated` raises, and then the active one stays."""
        return await self._finish(partial(self._activate, name, revision))

    async def close(self) -> None:
        """Gives up what is not finished."""
        changes = list(self._changes)
        for change in changes:
            change.cancel()
        await asyncio.gather(*changes, return_exceptions=True)
        self._worker.close()

    async def _finish(self, change: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        await self._one.acquire()
        task = asyncio.ensure_future(change())
        self._changes.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._one.release()
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # seen, should nobody wait for it any more

    async def _reload(self) -> Shelf:
        if self._readiness.loaded_or_none is None:
            return (await self._load_again()).shelf
        loaded = self._readiness.loaded
        return self._swap(await self._worker.run(lambda: reloaded(loaded)))

    async def _activate(self, name: str, revision: str | None) -> Activated:
        loaded = self._readiness.loaded
        shelf, require = loaded.shelf, loaded.engine.require
        exact = await self._worker.run(lambda: resolved(shelf, name, revision))
        try:
            shelf = await self._worker.run(lambda: activated(shelf, name, exact, require))
        except (ProbeCorrupt, ProbeMismatch) as error:
            if exact:
                self._swap(noted(shelf, name, exact, error))
            raise
        return Activated(self._swap(shelf), loaded.shelf.active)

    def _swap(self, shelf: Shelf) -> Shelf:
        before = self._readiness.loaded.shelf.active
        self._readiness.swap(shelf)
        self._told(shelf)
        if shelf.active.revision != before.revision:
            log.info("probe %s %s scores from now on", shelf.active.name, shelf.active.revision)
        return shelf


def reloaded(loaded: Loaded) -> Shelf:
    """What the directory of the shelf holds now; a shelf without one stays as it is."""
    shelf = loaded.shelf
    if shelf.directory is None:
        return shelf
    return shelve(shelf.directory, require=loaded.engine.require, previous=shelf)


def noted(shelf: Shelf, name: str, revision: str, error: DetectorError) -> Shelf:
    """The shelf, which says what was wrong with a revision that should have become the active one."""
    reason = escaped(str(error), LONGEST_REASON)
    log.error("probe %s %s rejected: %s", name, revision, reason)
    entry = shelf.find(name) or Shelved(name, None, reason)
    return shelf.with_entry(entry.without(Rejected(revision, reason)))
