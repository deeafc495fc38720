"""Addresses to listen on."""

from __future__ import annotations

import ipaddress


def bracketed(host: str) -> str:
    """The host as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a proxy on it lets in whom it likes."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def overlap(one: str, other: str) -> bool:
    """Whether both can't be listened on at the same port: they are the same, or one stands for all."""
    hosts = {"127.0.0.1" if host == "localhost" else host for host in (one, other)}
    return len(hosts) == 1 or any(map(is_everywhere, hosts))


def is_everywhere(host: str) -> bool:
    """Whether the address stands for all of the machine's."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
