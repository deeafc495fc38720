"""The file that says who may do what: by token, of which it knows only the digest, or by name of a certificate."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from lapwing_server.security.principals import Principal
from lapwing_server.security.scopes import Scope, granted
from lapwing_server.security.watched import UnusableFile, Watched, bytes_of
from lapwing_server.toml_text import NoToml, parsed

LONGEST_TOKEN: Final = 512

NAME: Final = re.compile(r"[A-Za-z0-9*][A-Za-z0-9 ._@:/*-]{0,99}")


def a_name(value: str) -> str:
    """The value, which may stand in a log as it is."""
    if not NAME.fullmatch(value):
        raise ValueError(
            "should be 1 to 100 letters, digits, spaces and . _ @ : / * -, the first one a letter, a digit or *"
        )
    return value


def grantable(value: Any) -> Any:
    """The value, which is a scope that somebody can have."""
    if value not in (Scope.READ, Scope.SCORE, Scope.ADMIN):
        raise ValueError("should be read, score or admin")
    return value


class Grant(BaseModel):
    """What somebody may do, how often, and until when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(a_name)]
    scopes: Annotated[tuple[Annotated[Scope, BeforeValidator(grantable)], ...], Field(min_length=1)]
    requests_per_second: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    burst: Annotated[int, Field(ge=1)] | None = None
    streams: Annotated[int, Field(ge=1)] | None = None
    expires: AwareDatetime | None = None

    @model_validator(mode="after")
    def _whole(self) -> Grant:
        if self.burst and not self.requests_per_second:
            raise ValueError("burst needs requests_per_second: nothing is limited by it alone")
        return self

    @property
    def principal(self) -> Principal:
        """The same as somebody who calls."""
        return Principal(self.name, granted(self.scopes), self.streams, self.requests_per_second, self.burst)

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
    """Who may do what, as the file said when `file` was last refreshed.

    Args:
        path: the file.
        mutual: whether clients are asked for a certificate at all.
        clock: seconds since 1970.

    Raises:
        UnusableFile: it is not as it should be.
    """

    def __init__(self, path: Path, *, mutual: bool = True, clock: Callable[[], float] = time.time) -> None:
        self.file = Watched([path], lambda: read(path, mutual=mutual))
        self._clock = clock

    def bearer(self, token: str) -> TokenGrant | None:
        """The grant of a token, even if it has expired; None for an unknown one.

        Takes as long for every token: all digests are compared, each in constant time.
        """
        digest = digest_of(token[:LONGEST_TOKEN])
        found = None
        for grant in self.file.content.tokens:
            if hmac.compare_digest(grant.sha256, digest):
                found = grant
        return found if len(token) <= LONGEST_TOKEN else None

    def certificate(self, names: Sequence[str]) -> Grant | None:
        """The grant of a certificate with one of these names; None for an unknown one.

        Of several the first one in the file that has not expired, else the first one.
        """
        found = [grant for grant in self.file.content.certificates if grant.name in names]
        return next(filter(self.valid, found), found[0] if found else None)

    def valid(self, grant: Grant) -> bool:
        """Whether it has not expired."""
        return grant.valid(self._clock())


def digest_of(token: str) -> str:
    """What the file holds of a token: hexadecimal SHA-256."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def read(path: Path, *, mutual: bool = True) -> Grants:
    """What the file says; see `grants_of`.

    Raises:
        UnusableFile: it can't be read or used.
    """
    return grants_of(bytes_of(path), path, mutual=mutual)


def grants_of(data: bytes, path: Path, *, mutual: bool = True) -> Grants:
    """What the bytes say, which are or will be those of the file.

    Args:
        mutual: whether clients are asked for a certificate; else nobody could ever have the grant of one.

    Raises:
        UnusableFile: they are no TOML, or not of this form. Nothing is quoted: a token may have been put there.
    """
    try:
        grants = Grants.model_validate(parsed(data))
    except NoToml as error:
        raise UnusableFile(f"tokens_file {path} {error}") from None
    except ValidationError as error:
        raise UnusableFile(f"tokens_file {path}: {told(error)}") from None
    for problem in problems(grants, mutual):
        raise UnusableFile(f"tokens_file {path}: {problem}")
    return grants


def problems(grants: Grants, mutual: bool) -> Iterator[str]:
    """What is wrong with grants that are sound each by itself."""
    for digest in repeated(grant.sha256 for grant in grants.tokens):
        names = [grant.name for grant in grants.tokens if grant.sha256 == digest]
        yield f"the same sha256 stands twice, under {' and '.join(names)}"
    for name in repeated(grant.name for grant in grants.certificates):
        yield f"two certificates have the name {name}; make one entry of them"
    if grants.certificates and not mutual:
        yield "it names certificates, and no client is asked for one: give tls_client_ca, or take them out"


def repeated(values: Iterable[str]) -> list[str]:
    """Those that stand there more than once."""
    return [value for value, times in Counter(values).items() if times > 1]


def told(error: ValidationError) -> str:
    """The first finding, without any value, and without a name that is not ours."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).removeprefix(".")
    if problem["type"] == "extra_forbidden":
        known = (TokenGrant if place.startswith("tokens[") else Grant if "[" in place else Grants).model_fields
        return f"{place.rpartition('.')[0] or 'the file'} has an unknown key; known are {', '.join(known)}"
    said = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"{place}: {said}" if place else said
