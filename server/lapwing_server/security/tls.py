"""The certificates of the server, which may be replaced while it runs."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NoReturn

import grpc

from lapwing_server.security.watched import UnusableFile, Watched, bytes_of


def credentials(cert: Path, key: Path, client_ca: Path | None = None) -> grpc.ServerCredentials:
    """TLS whose files are read anew, when they changed, at the next handshake.

    Args:
        cert: certificate chain, PEM.
        key: its private key, PEM, not encrypted.
        client_ca: authorities, PEM; only clients with a certificate by one of them get through.

    Raises:
        UnusableFile: one of them can't be used, or they do not belong together.
    """
    paths = [cert, key, *([client_ca] if client_ca else [])]
    files = Watched(paths, lambda: configuration(cert, key, client_ca))
    return grpc.dynamic_ssl_server_credentials(
        files.content,
        lambda: files.content if files.refresh() else None,  # type: ignore[arg-type, return-value]  # None: as before
        require_client_authentication=client_ca is not None,
    )


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
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=authorities.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            why = getattr(error, "reason", None) or "it is not PEM"
            raise UnusableFile(f"tls_client_ca {client_ca} can't be used: {why}") from None
    if pair != (bytes_of(key), bytes_of(cert)):
        raise UnusableFile(f"tls_cert {cert} and tls_key {key} changed while they were read")
    return grpc.ssl_server_certificate_configuration([pair], authorities)


def no_password() -> NoReturn:
    """OpenSSL would ask for one on the terminal."""
    raise ValueError("the key is encrypted")
