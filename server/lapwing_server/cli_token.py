"""The verb `lapwing token`."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic import ValidationError

from lapwing_server.security.tokens import TokenGrant, digest_of, told
from lapwing_server.security.tokens_file import add
from lapwing_server.security.watched import UnusableFile

LONGEST: Final = 36_500
"""Days; a hundred years."""


def token(
    name: Annotated[str, typer.Argument(help="Who will use it; stands in the server's log.")],
    scope: Annotated[
        list[str],
        typer.Option(
            help="score: score and generate; read: see the server's state, probes and heatmaps; admin: activate and "
            "reload probes, and all of the others. Give it as often as needed."
        ),
    ],
    into: Annotated[
        Path | None, typer.Option(metavar="PATH", help="File to add the token to, made when it is not there.")
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=LONGEST, help="Days until it expires; never without it.")
    ] = None,
    requests_per_second: Annotated[
        float | None, typer.Option(help="Calls in a second, in the long run; the server's setting without it.")
    ] = None,
    burst: Annotated[
        int | None,
        typer.Option(help="Calls at once, with --requests-per-second; as many as in one second without it."),
    ] = None,
    streams: Annotated[
        int | None, typer.Option(help="Streams at the same time; the server's limit without it.")
    ] = None,
) -> None:
    """Make a token for a server.

    Prints the token, which is stored nowhere, and the lines for the TOML file of lapwing serve --tokens-file, which
    know only its SHA-256. Take a token back by deleting its lines: the server sees within seconds that
    the file changed.

    Clients that show a certificate (--tls-client-ca) can be named in the file without a token, each by its name and
    scopes under the heading [[certificates]].

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
        "burst": burst,
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
