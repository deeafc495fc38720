"""Encryption: whom to trust, who we are, and what was wrong when it failed. Knows no calls."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from lapwing_client.addresses import Place
from lapwing_client.errors import TLSError
from lapwing_client.requests import unusable

Source = str | Path | bytes
"""A file in PEM form, or what is in it."""

KINDS = {"ca": "CERTIFICATE", "certificate": "CERTIFICATE", "key": "PRIVATE KEY"}
"""What the parts of a `TLS` hold in PEM form."""

HINTS = ("handshake failed", "Hostname Verification", "Cannot check peer", "CERTIFICATE_VERIFY_FAILED")
"""How gRPC begins to say that it was TLS, in one version or another."""


@dataclass(frozen=True)
class TLS:
    """How to encrypt a connection; everything in PEM form, as a path or as bytes.

    Raises:
        InvalidRequest: a file can't be read or isn't of this form, or one of `certificate` and `key` is missing.
    """

    ca: Source | None = field(default=None, repr=False)
    """Certificates of the authorities to trust; those of this system without it."""

    certificate: Source | None = field(default=None, repr=False)
    """Our own certificate, for a server that asks who we are (mTLS)."""

    key: Source | None = field(default=None, repr=False)
    """The key of `certificate`, not encrypted."""

    server_name: str = ""
    """The name to look for in the server's certificate; the host of the address without it."""

    read: dict[str, bytes] = field(init=False, repr=False, compare=False)
    """What was in the files."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise unusable("tls", "has one of certificate and key; give both or none of them")
        given = [(name, kind, getattr(self, name)) for name, kind in KINDS.items()]
        found = {name: pem(value, kind, f"tls.{name}") for name, kind, value in given if value is not None}
        object.__setattr__(self, "read", found)
        self.context()

    @classmethod
    def of(cls, tls: bool | Source | TLS | None) -> TLS | None:
        """What a caller gives: nothing, `True`, the authorities, or all of it."""
        if tls is None or tls is False:
            return None
        if isinstance(tls, TLS):
            return tls
        return cls() if tls is True else cls(ca=tls)

    def credentials(self) -> grpc.ChannelCredentials:
        """The same for gRPC."""
        roots = self.read.get("ca") or system_roots()
        return grpc.ssl_channel_credentials(roots, self.read.get("key"), self.read.get("certificate"))

    def context(self) -> ssl.SSLContext:
        """The same for Python, without `certificate`, which it would read from files only."""
        try:
            context = ssl.create_default_context(cadata=self.read["ca"].decode() if "ca" in self.read else None)
        except (ssl.SSLError, ValueError) as error:
            raise unusable("tls.ca", f"holds no readable certificate: {error}") from None
        context.set_alpn_protocols(["h2"])
        return context


def pem(source: Source, kind: str, field: str) -> bytes:
    """What is in the file, or the bytes themselves.

    Raises:
        InvalidRequest: it can't be read, or holds nothing of this kind.
    """
    if not isinstance(source, str | Path | bytes) or source == "":
        what = "empty" if source == "" else f"a {type(source).__name__}"  # which may hold a key
        raise unusable(field, f"is {what}; give the path of a file, or the bytes in it")
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise unusable(field, f"{error.filename} can't be read: {error.strerror}") from None
    if b"-----BEGIN " not in data or f"{kind}-----".encode() not in data or not data.isascii():
        raise unusable(field, f"holds no {kind.lower()} in PEM form (-----BEGIN {kind}-----)")
    if b"ENCRYPTED" in data:
        raise unusable(field, "is encrypted, which gRPC can't read; give the plain key, readable by its owner only")
    return data


def system_roots() -> bytes | None:
    """The authorities that this system trusts; None when only gRPC's own list is at hand."""
    file = ssl.get_default_verify_paths().cafile
    if file is not None:
        return Path(file).read_bytes()
    found = ssl.create_default_context().get_ca_certs(binary_form=True)
    return "".join(map(ssl.DER_cert_to_PEM_cert, found)).encode() or None


def explain(places: Sequence[Place], tls: TLS | None, name: str, seconds: float, said: str) -> TLSError | None:
    """Connects once more to find out what TLS had to do with a connection that failed.

    Args:
        places: where the server is.
        tls: how gRPC tried to connect; None for an unencrypted connection.
        name: that gRPC looked for in the certificate; empty for the host of each place.
        seconds: that each place may take.
        said: what gRPC said.

    Returns:
        The mistake; None when TLS was not to blame.
    """
    for place in places:
        found = plain_mistake(place, seconds) if tls is None else tls_mistake(place, tls, name, seconds)
        if found is not None:
            return found
    if tls is not None and speaks_of_tls(said):
        return mistake("TLS_FAILED", f"no encrypted connection could be made ({said})")
    return None


def speaks_of_tls(said: str) -> bool:
    """Whether gRPC's words on a failed connection are about TLS."""
    return any(hint in said for hint in HINTS)


def plain_mistake(place: Place, seconds: float) -> TLSError | None:
    """What an unencrypted client did wrong: whether the server speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with connected(place, seconds) as raw, context.wrap_socket(raw):
            return mistake("SERVER_SPEAKS_TLS", f"{shown(place)} speaks TLS and this client does not; give tls=")
    except OSError:
        return None


def tls_mistake(place: Place, tls: TLS, name: str, seconds: float) -> TLSError | None:
    """What an encrypted client did wrong, or its server."""
    context = tls.context()
    try:
        with connected(place, seconds) as raw, context.wrap_socket(raw, server_hostname=name or place[0]) as secure:
            if secure.selected_alpn_protocol() != "h2":
                return mistake("NO_HTTP2", f"{shown(place)} speaks TLS, but not gRPC's HTTP/2: it is another server")
            if secure.recv(1):
                return None
    except ssl.SSLCertVerificationError as error:
        return certificate_mistake(place, error)
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            return mistake("SERVER_SPEAKS_NO_TLS", f"{shown(place)} does not speak TLS; leave out tls=")
        return mistake("TLS_FAILED", f"{shown(place)} could not agree on TLS with this client ({error.reason})")
    except OSError:
        return None
    if tls.certificate is None:
        message = f"{shown(place)} wants a client certificate; give tls=TLS(certificate=, key=)"
        return mistake("CERTIFICATE_WANTED", message)
    return mistake("CERTIFICATE_REFUSED", f"{shown(place)} does not accept this client's certificate")


def certificate_mistake(place: Place, error: ssl.SSLCertVerificationError) -> TLSError:
    """What is wrong with the server's certificate."""
    reason = {10: "CERTIFICATE_EXPIRED", 9: "CERTIFICATE_NOT_YET_VALID", 62: "WRONG_NAME", 64: "WRONG_NAME"}.get(
        error.verify_code, "UNKNOWN_AUTHORITY"
    )
    mend = {
        "WRONG_NAME": "give the address by the name in the certificate, or that name as TLS(server_name=)",
        "UNKNOWN_AUTHORITY": "give the certificate of its authority as tls=",
    }.get(reason, "its operator must renew it, or the clock here is wrong")
    return mistake(reason, f"the certificate of {shown(place)} is not to be trusted: {error.verify_message}; {mend}")


def connected(place: Place, seconds: float) -> socket.socket:
    """A connection; each wait on it ends after these seconds."""
    return socket.create_connection(place, timeout=max(seconds, 0.001))


def shown(place: Place) -> str:
    """The place as an address."""
    return f"[{place[0]}]:{place[1]}" if ":" in place[0] else f"{place[0]}:{place[1]}"


def mistake(reason: str, message: str) -> TLSError:
    """The error."""
    return TLSError(message, reason=reason, code="UNAVAILABLE")
