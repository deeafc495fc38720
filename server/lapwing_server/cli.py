"""The verb of this package: `lapwing serve`."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[
        str | None, typer.Option(help="Hub id or path of a causal language model; the embedded one without it.")
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option(exists=True, help="A probe directory, or a directory of them; the embedded one without it."),
    ] = None,
    probe: Annotated[str | None, typer.Option(help="Name of the probe that scores; the first one without it.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 50051,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen on an address that others can reach, without encryption.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log more; texts of errors may then quote prompts.")
    ] = False,
) -> None:
    """Serve scores over gRPC.

    Prints one line, "listening on HOST:PORT", and logs on standard error. Stop it with Ctrl-C or SIGTERM.

    Example: lapwing serve --port 50051
    """
    if not (insecure or is_loopback(host)):
        typer.echo(
            f"--host is {host!r}, which others can reach, and there is no encryption; "
            "keep 127.0.0.1 behind a proxy, or say --insecure",
            err=True,
        )
        raise typer.Exit(2)
    if model is not None and probes is None:
        raise typer.BadParameter("--model needs --probes: the embedded probe was fitted on the embedded model only")
    log_to_standard_error(verbose)
    from lapwing_server.engine import loader
    from lapwing_server.server import Settings
    from lapwing_server.server import serve as serve_until_told

    settings = Settings(host=host, port=port)
    try:
        asyncio.run(serve_until_told(loader(model, probes, probe), settings, announce))
    except OSError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def log_to_standard_error(verbose: bool) -> None:
    """Our own log; of libraries only what went wrong."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    logging.getLogger("lapwing").setLevel(logging.DEBUG if verbose else logging.INFO)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def announce(address: str) -> None:
    """One line for whoever started the server.

    Raises:
        OSError: nobody can read it.
    """
    try:
        print(f"listening on {address}", flush=True)
    except OSError as error:
        raise OSError(f"listening on {address}, but standard output can't be written: {error.strerror}") from error
