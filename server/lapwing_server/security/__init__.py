"""Who may call what, over which connection, and how often: the door of the server, as its settings want it."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from lapwing_server.security import tls
from lapwing_server.security.authenticator import Authenticator
from lapwing_server.security.rates import Rates
from lapwing_server.security.tokens import Tokens
from lapwing_server.settings import Settings, is_loopback


def authenticator(settings: Settings, shed: Callable[[str], None]) -> Authenticator:
    """Who decides who may call.

    Args:
        settings: of the server.
        shed: told the reason of every call that came too often.

    Raises:
        UnusableFile: the file of tokens is not as it should be.
    """
    return Authenticator(
        Tokens(settings.tokens_file) if settings.tokens_file else None,
        mutual=settings.tls_client_ca is not None,
        trusted=is_loopback(settings.host),
        rates=Rates(settings.requests_per_second, settings.burst),
        shed=shed,
    )


def credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """The server's TLS; None when it speaks without.

    Raises:
        UnusableFile: certificate, key or authorities can't be used.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return tls.credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
