"""Which answers share a batch, and how batches are put together and taken apart. Runs no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lapwing_detector.batch import Batch
from lapwing_detector.running import RunningLogits
from lapwing_detector.writing import Stream

Failure = tuple[Stream, Exception]
"""An answer that has ended, and why."""


@dataclass(eq=False)
class Group:
    """Answers in the order of the rows of their batch."""

    streams: list[Stream]
    batch: Batch
    running: RunningLogits = field(init=False)

    def __post_init__(self) -> None:
        self.running = RunningLogits(self.streams[0].probe, self.batch)

    @property
    def key(self) -> str:
        """The same for groups that may become one."""
        first = self.streams[0]
        return f"alone {id(first)}" if first.alone else first.probe.revision

    def rows(self, wanted: Callable[[Stream], bool]) -> list[int]:
        """The rows of some of its answers."""
        return [row for row, stream in enumerate(self.streams) if wanted(stream)]


Part = tuple[Group, list[int]]
"""Some rows of a group."""


def regrouped(groups: Iterable[Group]) -> tuple[list[Group], list[Failure]]:
    """Puts together all that may share a forward, and takes out what is paused or has ended.

    Returns:
        Groups whose answers are all active, or all paused; and the answers for whose rows there was no memory.
    """
    active: dict[str, list[Part]] = {}
    new: list[Group] = []
    failures: list[Failure] = []
    for group in groups:
        if going := group.rows(lambda one: one.active):
            active.setdefault(group.key, []).append((group, going))
        if paused := group.rows(lambda one: one.paused and not one.ended):
            _gather([(group, paused)], new, failures)
    for parts in active.values():
        _gather(parts, new, failures)
    return new, failures


def without_ended(group: Group) -> Group | None:
    """The answers that have not ended, with no more memory than they need; None if there is none.

    Where there is no memory to move them, they stay where they are.
    """
    rows = group.rows(lambda one: not one.ended)
    if not rows:
        return None
    new: list[Group] = []
    try:
        _gather([(group, rows)], new)
    except Exception:
        return group
    return new[0]


def failed(stream: Stream, error: Exception) -> Failure:
    """Ends an answer."""
    stream.ended = True
    return stream, error


def _gather(parts: Sequence[Part], groups: list[Group], failures: list[Failure] | None = None) -> None:
    """Adds the rows to the groups as one; without a list of failures it raises."""
    group, rows = parts[0]
    if len(parts) == 1 and len(rows) == len(group.streams):
        groups.append(group)
        return
    streams = [group.streams[row] for group, rows in parts for row in rows]
    try:
        groups.append(Group(streams, Batch.gather([(group.batch, rows) for group, rows in parts])))
    except Exception as error:
        if failures is None:
            raise
        if len(parts) == 1:
            failures += [failed(stream, error) for stream in streams]
        else:  # perhaps there is memory for each of them
            for part in parts:
                _gather([part], groups, failures)
