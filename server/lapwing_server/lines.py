"""Lines of the log on their way out: whoever logs waits for nobody who reads."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from io import UnsupportedOperation
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue
from typing import IO, Final

ROOM: Final = 10_000
"""Lines that wait to be written; further ones are lost."""

PATIENCE: Final = 1.0
"""Seconds that the end of the process waits for what is not written."""

LOST: Final = "%d lines of the log were lost, because nobody read those before them in time"


class Lines(QueueHandler):
    """Makes one line of each record, and hands it to a thread that writes it.

    What finds no room is lost and counted; once there is room again, a line says how much was lost. What can't be made
    a line, or not be written, is lost in silence: the standard handlers would print the record's arguments.

    Args:
        stream: where to write.
        room: most lines that wait.
    """

    queue: Queue[logging.LogRecord]

    def __init__(self, stream: IO[str], room: int = ROOM) -> None:
        super().__init__(Queue(room))
        self.lost = 0
        """Lines for which there was no room, since somebody was last told."""
        self._room = room
        self._listener = QueueListener(self.queue, Writer(stream))
        self._listener.start()

    def enqueue(self, record: logging.LogRecord) -> None:
        """Hands a line over, or drops it; after one was dropped all are, until half of those that wait are written."""
        if self.lost and self.queue.qsize() > self._room // 2:
            self.lost += 1
            return
        try:
            if self.lost:
                self.queue.put_nowait(self.prepare(self._notice()))
                self.lost = 0
            self.queue.put_nowait(record)
        except Full:
            self.lost += 1

    def wait(self, seconds: float) -> bool:
        """Whether, after at most so long, everything is written."""
        with self.queue.all_tasks_done:
            return self.queue.all_tasks_done.wait_for(lambda: not self.queue.unfinished_tasks, seconds)

    def flush(self) -> None:
        """Called at the end of the process, which must come also when nobody reads."""
        if self.wait(PATIENCE) and self.lost:
            self.queue.put_nowait(self.prepare(self._notice()))
            self.wait(PATIENCE)

    def close(self) -> None:
        """Lets the thread end, after what waits by now; does not wait for it."""
        with suppress(Full):
            self._listener.enqueue_sentinel()
        super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Stays silent."""

    def _notice(self) -> logging.LogRecord:
        return logging.LogRecord("lapwing.server", logging.WARNING, __file__, 0, LOST, (self.lost,), None)


class Writer(logging.Handler):
    """Writes lines that are made already.

    Holds no lock meanwhile, neither a handler's nor a stream's, for which the end of the process would wait.
    """

    def __init__(self, stream: IO[str]) -> None:
        super().__init__()
        self._stream = stream
        self._descriptor = descriptor_of(stream)

    def handle(self, record: logging.LogRecord) -> bool:
        """Blocks for as long as nobody reads."""
        data = f"{record.msg}\n".encode("utf-8", "backslashreplace")
        try:
            if self._descriptor is None:
                self._stream.write(data.decode())
            else:
                write_all(self._descriptor, data)
        except (OSError, ValueError):  # full, or closed
            return False
        return True


def descriptor_of(stream: IO[str]) -> int | None:
    """Where the stream goes; None for one that is in memory."""
    try:
        return stream.fileno()
    except (AttributeError, UnsupportedOperation):
        return None


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of it, also where whoever shares the descriptor made it non-blocking."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            time.sleep(0.05)
