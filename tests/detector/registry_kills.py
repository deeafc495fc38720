"""Publishers that are killed: what does a reader find afterwards?

    python registry_kills.py DIRECTORY KILLS SEED [careless]

Half of the kills come at one of the calls that touch a file, the other half after a time; both are drawn by lot. One
process imports everything and forks a child for every publisher. A careless publisher writes CURRENT in place.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lapwing_detector import durable
from lapwing_detector.registry import Registry
from lapwing_detector.registry_files import CURRENT
from tests.detector.registries import a_revision, write_probe

WATCHED = frozenset(
    (
        "open",
        "read",
        "write",
        "flush",
        "close",
        "fsync",
        "replace",
        "rename",
        "mkdir",
        "rmdir",
        "unlink",
        "chmod",
        "stat",
        "lstat",
        "flock",
        "scandir",
    )
)
EACH = 2
"""Revisions that a publisher publishes, one after the other."""


class Moments:
    """Counts calls of the watched functions and kills the process at one of them."""

    def __init__(self, watched: frozenset[str], fatal: int | None) -> None:
        self.watched, self.count, self.fatal = watched, 0, fatal

    def __call__(self, frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in self.watched:
            self.count += 1
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)


def publish(root: Path, sources: list[Path], moments: Moments, told: int) -> None:
    """Tells of each revision after it was published, and at the end how many moments there were."""
    registry = Registry(root)
    for source in sources:
        sys.setprofile(moments)
        registry.publish(source, activate=True)
        sys.setprofile(None)
        os.write(told, b"published\n")
    os.write(told, f"{moments.count}\n".encode())


def forked(work: Callable[[int], None], after: float | None) -> list[str]:
    """What a child process told before it ended or, after so many seconds, was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader) as file:
        told = file.read().split()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("a publisher failed by itself")
    return told


def found(root: Path) -> dict[str, Any]:
    """What a reader finds: the number of the revision that scores, and whether all that was published is sound."""
    registry = Registry(root)
    left = len(list(root.glob(".tmp-*"))) if root.is_dir() else 0
    try:
        active = registry.current().active if root.is_dir() and any(root.iterdir()) else ""
        if not active:
            return {"serves": -1, "sound": True, "left": left}
        bias = registry.load(active).bias
        return {"serves": int(bias), "sound": not any(one.reason for one in registry.verify()), "left": left}
    except Exception as error:
        return {"serves": -2, "sound": False, "left": left, "error": str(error)}


def write_in_place(path: Path, data: bytes) -> None:
    """What `durable.replace` must not do."""
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        file.write(data[len(data) // 2 :])


def main(directory: str, kills: str, seed: str, careless: str = "") -> None:
    place, draw = Path(directory), random.Random(int(seed))
    watched = frozenset(["flush"]) if careless else WATCHED
    if careless:
        durable.replace = write_in_place

    def made(first: int) -> list[Path]:
        numbers = range(first, first + EACH)
        return [write_probe(place / "sources" / str(number), a_revision(number)) for number in numbers]

    begun = time.monotonic()
    work = partial(publish, place / "counted", made(0), Moments(watched, None))
    moments, seconds = int(forked(work, None)[-1]), time.monotonic() - begun
    root, runs, first = place / "registry", [], 0
    for number in range(int(kills)):
        by_time = number % 2 == 1 and not careless
        fatal, after = (None, draw.uniform(0, seconds)) if by_time else (draw.randint(1, moments), None)
        told = forked(partial(publish, root, made(first), Moments(watched, fatal)), after)
        done = told.count("published")
        run = found(root) | {"first": first, "published": done, "finished": len(told) > done}
        runs.append(run | {"moment": None if fatal is None else fatal / moments})
        first = max(first + done, run["serves"] + 1)
        if not run["sound"]:
            (root / CURRENT).unlink()
    forked(partial(publish, root, made(first), Moments(watched, None)), None)
    print(json.dumps({"runs": runs, "last": first + EACH - 1, "after": found(root)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
