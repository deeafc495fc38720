"""A server of one's own in another process, for as long as a context lasts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Thread, current_thread, main_thread
from types import FrameType

from lapwing_client.errors import LapwingError

STOP_SECONDS = 20.0
SELF = (sys.executable, "-m", "lapwing_client")
"""The `lapwing` command of this installation."""


class ServerFailed(Exception):
    """The server of one's own did not start, or ended by itself; the message holds the end of its log."""


@contextmanager
def running_server(arguments: Sequence[str]) -> Iterator[str]:
    """Starts `lapwing serve` on a free port of this machine and stops it on leaving, also when this process is told to.

    Args:
        arguments: of `lapwing serve`, without the port.

    Yields:
        Its address; it may still be loading.

    Raises:
        ServerFailed: it did not start, or ended before it was told to.
    """
    command = (*SELF, "serve", "--port", "0", *arguments)
    with (
        endings_as_exits(),
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=without_settings(os.environ)
        ) as server,
    ):
        log = LogReader(server)
        try:
            line = server.stdout.readline() if server.stdout else ""
            if not line.startswith("listening on "):
                server.wait(STOP_SECONDS)
                raise ServerFailed(f"the server did not start; its log ends with:\n{log.tail()}")
            yield line.removeprefix("listening on ").strip()
        except LapwingError as error:
            if server.poll() is None:
                raise
            raise ServerFailed(f"the server ended by itself; its log ends with:\n{log.tail()}") from error
        finally:
            stop(server)


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what is meant for a server that others use."""
    return {name: value for name, value in environment.items() if not name.startswith("LAPWING_")}


def stop(server: subprocess.Popen[str]) -> None:
    """Lets it finish what it does, or ends it."""
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()


@contextmanager
def endings_as_exits() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process by an exception, so that nothing it has started is left behind."""
    if current_thread() is not main_thread():  # signals are none of its business
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), leave) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


class LogReader:
    """Reads a server's log as it comes, so that a full pipe never stops it; keeps the last lines."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self.lines: deque[str] = deque(maxlen=20)
        self.thread = Thread(target=lambda: self.lines.extend(server.stderr or ()), daemon=True)
        self.thread.start()

    def tail(self) -> str:
        """The last lines, once the server has ended."""
        self.thread.join(1.0)
        return "".join(self.lines)
