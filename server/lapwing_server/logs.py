"""Where the log goes and what a line looks like: JSON for machines, text for people, never what somebody wrote.

Modules go on logging with `logging.getLogger("lapwing.server")`; named values travel in `extra`.

The core of gRPC writes on standard error by itself, in lines of its own form, of every failed handshake for example; it
reads GRPC_VERBOSITY when it is imported, long before anything here runs, and is silent where that is NONE.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import IO, Any, Final

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

from lapwing_server.context import current_call
from lapwing_server.lines import Lines

log = logging.getLogger("lapwing.server")

FORMATS: Final = ("auto", "json", "text")


def configure(level: str = "INFO", style: str = "auto", stream: IO[str] | None = None) -> Lines:
    """Sends all logs through one handler, ours from the level on and those of libraries from WARNING on.

    At "DEBUG", texts of errors are logged too, which may quote prompts; above it an error is its type and the lines
    of code that it passed through.

    Args:
        level: name of a level, in any case.
        style: "json" for one object a line, "text" for people, "auto" for text on a terminal and else JSON.
        stream: standard error without one.

    Returns:
        The handler, whose lines a thread writes; a second call replaces it.

    Raises:
        ValueError: there is no such level or format.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None or style not in FORMATS:
        raise ValueError(f"log level {level!r} or format {style!r} is not known; known formats are {FORMATS}")
    stream = stream or sys.stderr
    handler = Lines(stream)
    handler.setFormatter(formatter(stream, style, outspoken=number <= logging.DEBUG))
    root = logging.getLogger()
    for other in [one for one in root.handlers if isinstance(one, Lines)]:
        root.removeHandler(other)
        other.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("lapwing").setLevel(number)
    logging.captureWarnings(True)
    return handler


def formatter(stream: IO[str], style: str, outspoken: bool) -> logging.Formatter:
    """Makes lines of records; `outspoken` ones hold the texts of errors."""
    terminal = stream.isatty()
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        with_call,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info if outspoken else without_error_texts,
    ]
    rendering: list[Processor] = [structlog.processors.JSONRenderer(default=str)]
    if style == "text" or (style == "auto" and terminal):
        rendering = [on_one_line, structlog.dev.ConsoleRenderer(colors=terminal, pad_event_to=0)]
    return ProcessorFormatter(
        foreign_pre_chain=shared, processors=[ProcessorFormatter.remove_processors_meta, *rendering]
    )


def with_call(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """The event with what is known of the call in whose handler it was logged."""
    call = current_call.get()
    if call is not None:
        for name, value in call.known().items():
            event.setdefault(name, value)
    return event


def on_one_line(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """The event without characters that would begin a line, or steer a terminal; a traceback keeps its own, indented.

    JSON has escapes for them; in text whoever writes a newline would write the next line of the log.
    """
    for name, value in event.items():
        if name == "exception":
            event[name] = "\n".join(f"    {plain(line)}" for line in str(value).splitlines())
        elif not isinstance(value, bool | int | float):
            event[name] = plain(value if isinstance(value, str) else repr(value))
    return event


def plain(text: str) -> str:
    """The text with escapes for what is not printed: control characters, line separators, surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def without_error_texts(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """The event with an error's type and lines of code in place of all that it says."""
    error = event.pop("exc_info", None)
    event.pop("stack_info", None)
    if error is True:
        error = sys.exc_info()
    if isinstance(error, tuple):
        error = error[1]
    if isinstance(error, BaseException):
        event.update(described(error))
    return event


def described(error: BaseException) -> dict[str, Any]:
    """All that may be logged of an error at any level: its type and where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__qualname__,
        "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }


def catch_strays() -> None:
    """Sends what nobody caught to the log, in threads, in finalizers and on the running event loop."""

    def in_thread(args: threading.ExceptHookArgs) -> None:
        log.error("nobody caught an error in a thread", extra=described_or_none(args.exc_value))

    def in_finalizer(args: sys.UnraisableHookArgs) -> None:
        log.error("nobody caught an error in a finalizer", extra=described_or_none(args.exc_value))

    def on_loop(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        message = str(context.get("message", ""))
        known = {"what": spoken(message), **described_or_none(context.get("exception"))}
        log.error("nobody caught an error on the event loop", extra=known)
        log.debug("it says: %s", message)

    threading.excepthook, sys.unraisablehook = in_thread, in_finalizer
    asyncio.get_running_loop().set_exception_handler(on_loop)


def spoken(message: str) -> str:
    """What the event loop says, up to where it shows values: "Exception in callback f(1)" -> "... callback f"."""
    return re.split(r"[^\w\s.,:!-]", message, maxsplit=1)[0].strip()


def described_or_none(error: BaseException | None) -> dict[str, Any]:
    """The same of an error that may be missing."""
    return {} if error is None else described(error)
