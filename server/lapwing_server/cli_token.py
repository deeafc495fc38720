"""The verb `lapwing token`."""

from __future__ import annotations

import json
import os
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from lapwing_server.security.tokens import TokenGrant, digest_of, read, told
from lapwing_server.security.watched import UnusableFile


def token(
    name: Annotated[str, typer.Argument(help="Who will use it; stands in the server's log.")],
    scope: Annotated[
        list[str], typer.Option(help="read, score or admin, as often as needed; admin may do everything.")
    ],
    into: Annotated[
        Path | None, typer.Option(metavar="PATH", help="File to add the token to, made when it is not there.")
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, help="Days until it expires; never without it.")] = None,
    requests_per_second: Annotated[
        float | None, typer.Option(help="Calls in a second, in the long run; the server's setting without it.")
    ] = None,
    streams: Annotated[
        int | None, typer.Option(help="Streams at the same time; the server's limit without it.")
    ] = None,
) -> None:
    """Make a token for a server.

    Prints the token, which is stored nowhere, and the lines for the TOML file of lapwing serve --tokens-file, which
    know only its SHA-256. Take a token back by deleting its lines: the server reads the file anew when it changes.
    Clients that show a certificate (--tls-client-ca) can be named there without a token:

    [[certificates]] name = "scorer.example.org" scopes = ["score"]

    Example: lapwing token ci --scope score --scope read --into tokens.toml
    """
    made = "lapwing_" + secrets.token_urlsafe(32)
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=days) if days else None
    values = {
        "name": name,
        "sha256": digest_of(made),
        "scopes": scope,
        "expires": expires,
        "requests_per_second": requests_per_second,
        "streams": streams,
    }
    try:
        lines = as_toml(TokenGrant.model_validate(values))
        if into is not None:
            add(lines, into)
    except ValidationError as error:
        raise typer.BadParameter(told(error)) from None
    except UnusableFile as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(made if into else f"{made}\n\n{lines}")
    where = f"its digest is in {into}" if into else "the lines below it belong into the file of --tokens-file"
    typer.echo(f"the token is shown this once; {where}", err=True)


def as_toml(grant: TokenGrant) -> str:
    """The lines of the file."""
    values = {name: value for name, value in grant if value is not None}
    return "[[tokens]]\n" + "\n".join(f"{name} = {literal(value)}" for name, value in values.items())


def literal(value: object) -> str:
    """The value as TOML writes it."""
    return value.isoformat() if isinstance(value, datetime) else json.dumps(value)


def add(lines: str, path: Path) -> None:
    """Appends the lines by one write, so that a server that reads meanwhile sees all or nothing.

    Raises:
        UnusableFile: the file is not as it should be before.
        OSError: it can't be written.
    """
    before = path.exists() and bool(read(path).tokens or read(path).certificates)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab", buffering=0) as file:
        file.write(("\n" * before + lines + "\n").encode())
