"""The verb `lapwing serve`."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from lapwing_server import logs
from lapwing_server.flags import given, with_settings
from lapwing_server.security.watched import UnusableFile
from lapwing_server.setting_sources import Found, UnusableSettings, read

log = logging.getLogger("lapwing.server")

PATIENCE: Final = 1.0
"""Seconds that the end of the process waits for what is still being computed."""


@with_settings
def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="TOML file with any of these settings; the one of LAPWING_CONFIG without it."
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="The same as --log-level debug.")] = False,
    **flags: Any,
) -> None:
    """Serve scores over gRPC.

    Prints one line, "listening on HOST:PORT", and logs on standard error. Stop it with Ctrl-C or SIGTERM.

    Every setting can be given in three ways; the first one wins: a flag (--limits-new-tokens 256), an environment
    variable (LAPWING_LIMITS__NEW_TOKENS=256), a line of the TOML file of --config (limits.new_tokens = 256).
    What is unknown or contradictory ends the command with 2; the log begins with all settings and where they came from.

    Example: lapwing serve --port 50051

    Example: lapwing serve --host 0.0.0.0 --tls-cert server.pem --tls-key server.key --tokens-file tokens.toml
    """
    try:
        found = read(given(flags), config, verbose=verbose)
        logs.configure(found.settings.log_level, found.settings.log_format)
        serve_found(found)
    except (UnusableSettings, UnusableFile) as error:
        typer.echo(f"lapwing serve: the settings can't be used\n{error}", err=True)
        raise typer.Exit(2) from error
    except OSError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def serve_found(found: Found) -> None:
    """Serves until told to stop.

    Raises:
        UnusableFile: a certificate, key or file of tokens can't be used.
        OSError: a port can't be listened on.
    """
    from lapwing_server.engine import loader
    from lapwing_server.interpreter import run
    from lapwing_server.server import serve as serve_until_told

    for line in found.lines():
        log.info("%s", line)
    settings = found.settings
    load = loader(settings.model, settings.probes, settings.probe, device=settings.device, dtype=settings.dtype)
    run(serve_until_told(load, settings, announce))
    if computing(PATIENCE):
        leave()


def announce(address: str) -> None:
    """One line for whoever started the server.

    Raises:
        OSError: nobody can read it.
    """
    try:
        print(f"listening on {address}", flush=True)
    except OSError as error:
        raise OSError(f"listening on {address}, but standard output can't be written: {error.strerror}") from error


def computing(seconds: float) -> bool:
    """Whether, after at most so long, some thread of ours is still at work: a forward or a loading that goes on."""
    until = time.monotonic() + seconds
    ours = [one for one in threading.enumerate() if one.name.startswith("lapwing-")]
    for thread in ours:
        thread.join(max(0.0, until - time.monotonic()))
    return any(thread.is_alive() for thread in ours)


def leave() -> None:
    """Ends the process well, and at once.

    Python's own end would stop each thread where it next asks for the interpreter; in the middle of a forward that
    is in C++ that can't be unwound, so that the whole process aborts.
    """
    log.info("what is still being computed is given up")
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)
