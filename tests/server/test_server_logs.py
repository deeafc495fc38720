"""What a line of the log looks like, whose lines there are, and what none of them holds."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from lapwing_server import logs
from lapwing_server.context import CallRecord, answered_by, current_call, note

SECRET = "what somebody wrote"
OURS = logging.getLogger("lapwing.server")
THEIRS = logging.getLogger("some.library")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Leaves logging as it was."""
    root, ours = logging.getLogger(), logging.getLogger("lapwing")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(False)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def configured(level: str = "info", format: str = "json", stream: io.StringIO | None = None) -> io.StringIO:
    stream = stream or io.StringIO()
    logs.configure(level, format, stream)
    return stream


def test_a_line_is_one_object_whatever_is_in_it() -> None:
    stream = configured()
    OURS.info("two\nlines %s", "\u2028 \ud800 ü", extra={"number": 1.5, "odd": object, "text": 'a "quote"\n'})
    [line] = lines(stream)
    assert line["event"] == "two\nlines \u2028 \ud800 ü"
    assert (line["level"], line["logger"], line["number"]) == ("info", "lapwing.server", 1.5)
    assert line["text"] == 'a "quote"\n'
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize(
    ("level", "ours", "theirs"),
    [
        ("debug", ["debug", "info", "warning", "error"], ["warning", "error"]),
        ("info", ["info", "warning", "error"], ["warning", "error"]),
        ("WARNING", ["warning", "error"], ["warning", "error"]),
        ("error", ["error"], ["warning", "error"]),
    ],
)
def test_of_libraries_only_what_went_wrong(level: str, ours: list[str], theirs: list[str]) -> None:
    stream = configured(level)
    for logger in (OURS, THEIRS):
        for one in ("debug", "info", "warning", "error"):
            getattr(logger, one)("x")
    found = [(line["logger"], line["level"]) for line in lines(stream)]
    assert found == [(OURS.name, one) for one in ours] + [(THEIRS.name, one) for one in theirs]


def test_warnings_of_python_are_lines_too() -> None:
    stream = configured()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old ways", DeprecationWarning, stacklevel=1)
    [line] = lines(stream)
    assert "old ways" in line["event"]


def fail() -> None:
    raise RuntimeError(SECRET)


@pytest.mark.parametrize("logger", [OURS, THEIRS])
@pytest.mark.parametrize("format", ["json", "text"])
@pytest.mark.parametrize("level", ["info", "debug"])
def test_an_error_is_its_type_and_its_way_unless_asked_for_more(
    logger: logging.Logger, format: str, level: str
) -> None:
    stream = configured(level, format)
    try:
        fail()
    except RuntimeError:
        logger.exception("it failed", stack_info=True)
    assert "RuntimeError" in stream.getvalue()
    assert "fail" in stream.getvalue()
    assert (SECRET in stream.getvalue()) == (level == "debug")


def test_a_line_that_can_not_be_written_is_lost_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no space left")

    handler = logs.configure("info", "json", Full())
    for template in ("%s", "%d"):
        record = logging.LogRecord("lapwing.server", logging.INFO, __file__, 1, template, (SECRET,), None)
        handler.handle(record)
        assert capfd.readouterr() == ("", "")
        logging.StreamHandler(Full()).handle(record)
        assert SECRET in capfd.readouterr().err, "control: the standard one prints its arguments"


@pytest.mark.parametrize("terminal", [True, False])
def test_people_at_a_terminal_get_text_and_machines_do_not(terminal: bool) -> None:
    stream = configured(format="auto", stream=Terminal() if terminal else io.StringIO())
    OURS.info("hello", extra={"number": 2})
    assert stream.getvalue().startswith("{") != terminal
    assert "hello" in stream.getvalue()
    assert ("\x1b[" in stream.getvalue()) == terminal, "colours"


def test_text_that_goes_to_a_file_has_no_colours() -> None:
    stream = configured(format="text")
    OURS.info("hello", extra={"number": 2})
    assert "number=2" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_a_second_configuration_takes_the_place_of_the_first() -> None:
    first, second = configured(), configured()
    OURS.info("once")
    assert first.getvalue() == ""
    assert len(lines(second)) == 1


@pytest.mark.parametrize(("level", "format"), [("loud", "json"), ("info", "xml")])
def test_what_is_not_known_is_refused(level: str, format: str) -> None:
    before = list(logging.getLogger().handlers)
    with pytest.raises(ValueError, match=repr(level)):
        logs.configure(level, format)
    assert logging.getLogger().handlers == before


def test_a_line_of_a_call_says_whose() -> None:
    stream = configured()
    reset = current_call.set(CallRecord("Score", "id-7", principal="somebody"))
    answered_by("a-probe", "0123")
    note(tokens=5)
    OURS.info("inside")
    OURS.info("inside", extra={"tokens": 6})
    current_call.reset(reset)
    note(tokens=7)
    OURS.info("outside")
    inside, named, outside = lines(stream)
    known = {"request_id": "id-7", "principal": "somebody", "probe": "a-probe@0123", "tokens": 5}
    assert known.items() <= inside.items()
    assert named["tokens"] == 6, "what the line itself says is stronger"
    assert not known.keys() & outside.keys()


STRAYS = f"""
import asyncio, gc, threading
from lapwing_server import logs

def fail(*_):
    raise RuntimeError({SECRET!r})

class Late:
    __del__ = fail

async def forgotten():
    fail()

async def main():
    if CATCH:
        logs.catch_strays()
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    Late()
    asyncio.get_running_loop().call_soon(fail)
    task = asyncio.create_task(forgotten())
    await asyncio.sleep(0.05)
    del task
    gc.collect()
    await asyncio.sleep(0.05)

logs.configure("info", "json")
asyncio.run(main())
"""


@pytest.mark.parametrize("catch", [True, False])
def test_what_nobody_caught_is_a_line_and_quotes_nothing(catch: bool) -> None:
    """In a thread, in a finalizer, in a callback, in a task that was forgotten; without it Python prints the text."""
    script = f"CATCH = {catch}\n{STRAYS}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (SECRET in done.stderr) != catch
    if catch:
        found = [json.loads(line) for line in done.stderr.splitlines()]
        assert [line["error"] for line in found] == ["RuntimeError"] * 4
        assert all(line["at"][-1].endswith(" fail") for line in found)
