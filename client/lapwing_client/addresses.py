"""Where a server is: from what a caller writes to what gRPC resolves. Knows no certificates."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from lapwing_client.requests import listed, text, unusable

SCHEME = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds|google-c2p):")
"""What gRPC resolves by itself; any other word before a colon is a host."""

NAME = re.compile(r"[^\s/:\[\]@?#]+")
"""A host that is no IPv6 number; whether there is such a machine is another question."""

FORMS = "HOST:PORT, without http:// and with a port below 65536, or a list of several"

Place = tuple[str, int]
"""Host and port."""


@dataclass(frozen=True)
class Target:
    """One server, or several replicas that answer alike."""

    uri: str
    """As gRPC reads it."""

    places: tuple[Place, ...]
    """Where to connect; empty when only gRPC knows."""

    several: bool
    """Whether calls may go to more than one replica."""

    local: bool
    """Whether all of it is on this machine."""

    @classmethod
    def of(cls, target: str | Sequence[str]) -> Target:
        """Reads HOST:PORT, several of them as a list or with commas, or any address of gRPC's own.

        Names in a list are looked up once, here; `dns:///NAME:PORT` is looked up again when replicas go.

        Raises:
            InvalidRequest: it is none of these, or a name in a list is not known.
        """
        written = [target] if isinstance(target, str) else listed(target, "target", FORMS)
        parts = [part.strip() for one in written for part in text(one, "target").split(",")]
        if len(written) == 1 and (match := SCHEME.match(written[0].strip())):
            return resolved(written[0].strip(), match[1])
        if len(parts) == 1 and is_host(parts[0]):
            return cls(parts[0], places(parts), False, is_local(parts[0]))
        if not parts or not all(place_of(part) for part in parts):
            raise unusable("target", f"is {', '.join(parts)!r:.200}; give {FORMS}")
        if len(parts) == 1:
            return cls(parts[0], places(parts), False, is_local(parts[0]))
        return cls(numeric(parts), places(parts), True, all(map(is_local, parts)))


def resolved(target: str, scheme: str) -> Target:
    """A target with a scheme, which gRPC resolves."""
    rest = target.split(":", 1)[1]
    if scheme == "dns":
        parts = [rest.rsplit("/", 1)[-1]]
        return Target(target, places(parts), True, False)
    if scheme in ("ipv4", "ipv6"):
        parts = rest.lstrip("/").split(",")
        return Target(target, places(parts), len(parts) > 1, all(map(is_local, parts)))
    return Target(target, (), scheme in ("xds", "google-c2p"), is_local(target))


def places(parts: Sequence[str]) -> tuple[Place, ...]:
    """Host and port of each; 443, as gRPC takes it, of one without a port."""
    return tuple(place_of(part) or (part.strip("[]"), 443) for part in parts)


def place_of(address: str) -> Place | None:
    """Host and port of HOST:PORT; None when it isn't of this form."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) >= 2**16:
        return None
    return (host.strip("[]"), int(port)) if is_host(host) else None


def is_host(host: str) -> bool:
    """Whether it is the name or number of a machine; an IPv6 number may stand in brackets."""
    if ":" not in host:
        return bool(NAME.fullmatch(host))
    number = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return ipaddress.ip_address(number).version == 6
    except ValueError:
        return False


def numeric(parts: Sequence[str]) -> str:
    """The addresses of several hosts as gRPC's `ipv4:` or `ipv6:`, which take numbers only."""
    looked_up = [look_up(*place) for place in places(parts)]
    for family, scheme in ((socket.AF_INET, "ipv4"), (socket.AF_INET6, "ipv6")):
        found = [addresses[family] for addresses in looked_up if family in addresses]
        if len(found) == len(parts):
            return f"{scheme}:{','.join(found)}"
    raise unusable("target", "mixes hosts that have only IPv4 with hosts that have only IPv6; give one kind")


def look_up(host: str, port: int) -> dict[int, str]:
    """The first address of each family that a host has."""
    try:
        known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise unusable("target", f"has {host!r}, which is not known: {error.strerror or error}") from None
    return {
        family: f"[{place[0]}]:{port}" if family == socket.AF_INET6 else f"{place[0]}:{port}"
        for family, *_, place in reversed(known)
    }


def is_local(target: str) -> bool:
    """Whether the address is of this machine."""
    host = target.rsplit(":", 1)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or target.startswith("unix:")
