"""The certificates of the server, which may be replaced while it runs."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NoReturn

import grpc

from lapwing_server.security.watched import UnusableFile, Watched, Watcher, bytes_of


def credentials(
    cert: Path, key: Path, client_ca: Path | None = None, watcher: Watcher | None = None
) -> grpc.ServerCredentials:
    """TLS of what the files hold.

    Args:
        cert: certificate chain, PEM.
        key: its private key, PEM, not encrypted.
        client_ca: authorities, PEM; only clients with a certificate by one of them get through.
        watcher: sees when the files change; the handshakes after it are by what they hold then.

    Raises:
        UnusableFile: one of them can't be used, or they do not belong together.
    """
    paths = [cert, key, *([client_ca] if client_ca else [])]
    files = Watched(paths, lambda: configuration(cert, key, client_ca))
    if watcher is not None:
        watcher.add("tls_cert", files)
    return grpc.dynamic_ssl_server_credentials(
        files.content,
        Latest(files),  # type: ignore[arg-type]  # None: as before
        require_client_authentication=client_ca is not None,
    )


class Latest:
    """Called at each handshake; returns the configuration when it is another one than last time."""

    def __init__(self, files: Watched[grpc.ServerCertificateConfiguration]) -> None:
        self._files, self._given = files, files.content

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """None: as before."""
        latest = self._files.content
        if latest is self._given:
            return None
        self._given = latest
        return latest


def configuration(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCertificateConfiguration:
    """What the files hold, after a check that OpenSSL takes it: gRPC would say nothing and fail every handshake."""
    pair = bytes_of(key), bytes_of(cert)
    authorities = bytes_of(client_ca) if client_ca else None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or "it is encrypted"
        raise UnusableFile(f"tls_cert {cert} and tls_key {key} can't be used together: {why}") from None
    if client_ca and authorities is not None:
        try:
            text = authorities.decode("ascii", "backslashreplace")  # comments may be in any language
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
        except (ssl.SSLError, ValueError) as error:
            why = getattr(error, "reason", None) or "it is not PEM"
            raise UnusableFile(f"tls_client_ca {client_ca} can't be used: {why}") from None
    if pair != (bytes_of(key), bytes_of(cert)):
        raise UnusableFile(f"tls_cert {cert} and tls_key {key} changed while they were read")
    return grpc.ssl_server_certificate_configuration([pair], authorities)


def no_password() -> NoReturn:
    """OpenSSL would ask for one on the terminal."""
    raise ValueError("the key is encrypted")
