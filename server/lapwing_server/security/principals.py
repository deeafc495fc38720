"""Who calls."""

from __future__ import annotations

import ipaddress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

from lapwing_detector.head_map import escaped
from lapwing_server.context import Context
from lapwing_server.security.scopes import Scope

LONGEST_NAME = 100


@dataclass(frozen=True)
class Principal:
    """Somebody who may do something."""

    name: str
    """Of a token or certificate, else `peer_name`; may be logged."""

    scopes: frozenset[Scope]
    streams: int | None = None
    """Streams at the same time; what the server's limits say for None."""

    requests_per_second: float | None = None
    """Calls in a second, in the long run; what the server's settings say for None."""

    burst: int | None = None
    """Calls at once."""


current_principal: ContextVar[Principal | None] = ContextVar("current_principal", default=None)
"""Whose call the running handler answers; None outside of one."""


def principal_of(context: Context) -> Principal:
    """Whose call this is; outside of a guarded handler somebody who may do nothing, known by the address."""
    return current_principal.get() or somebody(peer_name(context), frozenset())


@lru_cache(maxsize=4096)
def somebody(name: str, scopes: frozenset[Scope]) -> Principal:
    """One of whom no more is known. Kept, since whoever calls calls often."""
    return Principal(name, scopes)


def peer_name(context: Context) -> str:
    """Who is at the other end, as far as an address tells: ipv4:127.0.0.1:5000 -> 127.0.0.1, unix:/run/a -> unix."""
    return name_of_peer(context.peer())


@lru_cache(maxsize=4096)
def name_of_peer(peer: str) -> str:
    """The same of what gRPC says of a connection, on which there are many calls."""
    kind, _, address = unquote(peer).partition(":")
    return household(address.rpartition(":")[0].strip("[]")) if kind in ("ipv4", "ipv6") else kind


def household(host: str) -> str:
    """The address, or the /64 that it is in: 2001:db8::1 -> 2001:db8::/64, all of which one machine may have."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4 or address.is_loopback or address.is_link_local:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address), 64), strict=False))


def certificate_names(context: Context) -> list[str]:
    """The names in the client's certificate, which an authority of ours vouches for: the common name comes first."""
    found = context.auth_context()
    names = [*found.get("x509_common_name", ()), *found.get("x509_subject_alternative_name", ())]
    return [escaped(name.decode("utf-8", "backslashreplace"), LONGEST_NAME) for name in names]
