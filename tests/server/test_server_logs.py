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
from service_fakes import WAIT, Running
from written_log import Written, logging_as_before

from lapwing_detector.errors import ProbeCorrupt
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
    with logging_as_before():
        yield


def test_a_line_is_one_object_whatever_is_in_it() -> None:
    log = Written()
    OURS.info("two\nlines %s", "\u2028 \ud800 ü", extra={"number": 1.5, "odd": object, "text": 'a "quote"\n'})
    [line] = log.lines
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
    log = Written(level)
    for logger in (OURS, THEIRS):
        for one in ("debug", "info", "warning", "error"):
            getattr(logger, one)("x")
    found = [(line["logger"], line["level"]) for line in log.lines]
    assert found == [(OURS.name, one) for one in ours] + [(THEIRS.name, one) for one in theirs]


def test_warnings_of_python_are_lines_too() -> None:
    log = Written()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old ways", DeprecationWarning, stacklevel=1)
    [line] = log.lines
    assert "old ways" in line["event"]


def fail() -> None:
    raise RuntimeError(SECRET)


@pytest.mark.parametrize("logger", [OURS, THEIRS])
@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize("level", ["info", "debug"])
def test_an_error_is_its_type_and_its_way_unless_asked_for_more(logger: logging.Logger, style: str, level: str) -> None:
    log = Written(level, style)
    try:
        fail()
    except RuntimeError:
        logger.exception("it failed", stack_info=True)
    assert "RuntimeError" in log.text
    assert "fail" in log.text
    assert (SECRET in log.text) == (level == "debug")


def test_a_line_that_can_not_be_written_is_lost_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no space left")

    handler = logs.configure("info", "json", Full())
    for template in ("%s", "%d"):
        record = logging.LogRecord("lapwing.server", logging.INFO, __file__, 1, template, (SECRET,), None)
        handler.handle(record)
        assert handler.wait(WAIT)
        assert capfd.readouterr() == ("", "")
        logging.StreamHandler(Full()).handle(record)
        assert SECRET in capfd.readouterr().err, "control: the standard one prints its arguments"


@pytest.mark.parametrize("terminal", [True, False])
def test_people_at_a_terminal_get_text_and_machines_do_not(terminal: bool) -> None:
    log = Written(style="auto", stream=Terminal() if terminal else io.StringIO())
    OURS.info("hello", extra={"number": 2})
    assert log.text.startswith("{") != terminal
    assert "hello" in log.text
    assert ("\x1b[" in log.text) == terminal, "colours"


def test_text_that_goes_to_a_file_has_no_colours() -> None:
    log = Written(style="text")
    OURS.info("hello", extra={"number": 2})
    assert "number=2" in log.text
    assert "\x1b" not in log.text


def test_a_second_configuration_takes_the_place_of_the_first() -> None:
    first, second = Written(), Written()
    OURS.info("once")
    assert first.text == ""
    assert len(second.lines) == 1


@pytest.mark.parametrize(("level", "style"), [("loud", "json"), ("info", "xml")])
def test_what_is_not_known_is_refused(level: str, style: str) -> None:
    before = list(logging.getLogger().handlers)
    with pytest.raises(ValueError, match=repr(level)):
        logs.configure(level, style)
    assert logging.getLogger().handlers == before


def test_a_line_of_a_call_says_whose() -> None:
    log = Written()
    reset = current_call.set(CallRecord("Score", "id-7", principal="somebody"))
    answered_by("a-probe", "0123")
    note(tokens=5)
    OURS.info("inside")
    OURS.info("inside", extra={"tokens": 6})
    current_call.reset(reset)
    note(tokens=7)
    OURS.info("outside")
    inside, named, outside = log.lines
    known = {"request_id": "id-7", "principal": "somebody", "probe": "a-probe@0123", "tokens": 5}
    assert known.items() <= inside.items()
    assert named["tokens"] == 6, "what the line itself says is stronger"
    assert not known.keys() & outside.keys()


FORGED = "two\n2026-01-01T00:00:00Z [error    ] forged\r\x1b[31m\u2028 \udcff"


@pytest.mark.parametrize("style", ["json", "text"])
@pytest.mark.parametrize("terminal", [True, False])
def test_nobody_writes_a_line_of_the_log_but_the_log(style: str, terminal: bool) -> None:
    log = Written(style=style, stream=Terminal() if terminal else io.StringIO())
    OURS.warning("%s", FORGED, extra={"name_of_a_file": FORGED, "list": [FORGED], "object": Odd()})
    OURS.warning("after it")
    forged, after = log.text.splitlines()  # also at what only Python takes for the end of a line
    assert "forged" in forged
    assert "after it" in after
    assert "\x1b[31m\u2028" not in forged, "nor does it steer a terminal"
    assert "udcff" in forged, "what UTF-8 can't hold shows as an escape"


class Odd:
    def __repr__(self) -> str:
        return FORGED


def test_a_traceback_that_was_asked_for_stays_readable_and_forges_nothing() -> None:
    log = Written("debug", "text")
    try:
        raise RuntimeError(FORGED)
    except RuntimeError:
        OURS.exception("it failed")
    first, *others = log.text.splitlines()
    assert "it failed" in first
    assert len(others) >= 4, "the traceback has lines of its own"
    assert all(line.startswith("    ") for line in others)


@pytest.mark.parametrize("level", ["info", "debug"])
def test_what_loading_fails_with_is_an_id_unless_asked_for_more(level: str) -> None:
    def load() -> Any:
        raise ValueError(SECRET)

    log = Written(level)
    with Running(load=load) as server:
        said = server.server.readiness.message
    [line] = [line for line in log.lines if line["event"].startswith("not serving")]
    [error_id] = [line["error_id"] for line in log.lines if "error_id" in line]
    for words in ("ValueError", error_id):
        assert words in line["event"]
        assert words in said
    assert SECRET not in said
    assert (SECRET in log.text) == (level == "debug")


def test_what_is_wrong_with_a_probe_is_said() -> None:
    """Our own words, which are of files."""

    def load() -> Any:
        raise ProbeCorrupt("weights.safetensors: its sha256 differs")

    log = Written()
    with Running(load=load):
        pass
    assert "its sha256 differs" in log.text


STRAYS = f"""
import asyncio, gc, threading
from lapwing_server import logs

SECRET = {SECRET!r}

def fail(*_):
    raise RuntimeError(SECRET)

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
    asyncio.get_running_loop().call_soon(fail, SECRET)
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
        said = [line["what"] for line in found if "what" in line]
        assert said == ["Exception in callback fail", "Task exception was never retrieved"], "without its arguments"
