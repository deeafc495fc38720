"""The file that says who may do what: by token, of which it knows only the digest, or by name of a certificate."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from lapwing_server.security.principals import Principal
from lapwing_server.security.scopes import Scope, granted
from lapwing_server.security.watched import UnusableFile, Watched, bytes_of

LONGEST_TOKEN: Final = 512

Grantable = Literal[Scope.READ, Scope.SCORE, Scope.ADMIN]


class Grant(BaseModel):
    """What somebody may do, how often, and until when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9*][A-Za-z0-9 ._@:/*-]{0,99}$")]
    scopes: Annotated[tuple[Grantable, ...], Field(min_length=1)]
    requests_per_second: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    burst: Annotated[int, Field(ge=1)] | None = None
    streams: Annotated[int, Field(ge=1)] | None = None
    expires: AwareDatetime | None = None

    @property
    def principal(self) -> Principal:
        """The same as somebody who calls."""
        return Principal(
            self.name, granted(map(Scope, self.scopes)), self.streams, self.requests_per_second, self.burst
        )

    def valid(self, now: float) -> bool:
        """Whether it has not expired; `now` in seconds since 1970."""
        return self.expires is None or now < self.expires.timestamp()


class TokenGrant(Grant):
    """What the bearer of a token may do."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the token, hexadecimal."""


class Grants(BaseModel):
    """All that the file says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[TokenGrant, ...] = ()
    """Several may have one name, so that a token can be replaced while the old one still holds."""

    certificates: tuple[Grant, ...] = ()
    """By common name or alternative name of a client's certificate."""


class Tokens:
    """Who may do what, as the file says now.

    Args:
        path: the file.
        clock: seconds since 1970.

    Raises:
        UnusableFile: it is not as it should be.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = Watched([path], lambda: read(path))
        self._clock = clock

    def bearer(self, token: str) -> TokenGrant | None:
        """The grant of a token, even if it has expired; None for an unknown one.

        Takes as long for every token: all digests are compared, each in constant time.
        """
        digest = digest_of(token[:LONGEST_TOKEN])
        found = None
        for grant in self._now.tokens:
            if hmac.compare_digest(grant.sha256, digest):
                found = grant
        return found if len(token) <= LONGEST_TOKEN else None

    def certificate(self, names: Sequence[str]) -> Grant | None:
        """The grant of a certificate with one of these names, even if it has expired; None for an unknown one."""
        return next((grant for grant in self._now.certificates if grant.name in names), None)

    def valid(self, grant: Grant) -> bool:
        """Whether it has not expired."""
        return grant.valid(self._clock())

    @property
    def _now(self) -> Grants:
        self._file.refresh()
        return self._file.content


def digest_of(token: str) -> str:
    """What the file holds of a token: hexadecimal SHA-256."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def read(path: Path) -> Grants:
    """What the file says.

    Raises:
        UnusableFile: it is no TOML, or not of this form. Nothing of it is quoted: a token may have been put into it.
    """
    try:
        grants = Grants.model_validate(tomllib.loads(bytes_of(path).decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        place = re.search(r"\(at (line \d+, column \d+|end of document)\)", str(error))
        raise UnusableFile(f"tokens_file {path} is no TOML" + (f", {place[1]}" if place else "")) from None
    except ValidationError as error:
        raise UnusableFile(f"tokens_file {path}: {told(error)}") from None
    digests = [grant.sha256 for grant in grants.tokens]
    twice = [grant.name for grant in grants.tokens if digests.count(grant.sha256) > 1]
    if twice:
        raise UnusableFile(f"tokens_file {path}: the same sha256 stands twice, under {' and '.join(twice)}")
    return grants


def told(error: ValidationError) -> str:
    """The first finding, without any value, and without a name that is not ours."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).removeprefix(".")
    if problem["type"] == "extra_forbidden":
        known = (TokenGrant if place.startswith("tokens[") else Grant if "[" in place else Grants).model_fields
        return f"{place.rpartition('.')[0] or 'the file'} has an unknown key; known are {', '.join(known)}"
    return f"{place}: {problem['msg'].removeprefix('Input ')}"
