"""Who may call what, over which connection, and how often: the door of the server, as its settings want it."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from lapwing_server.addresses import is_loopback
from lapwing_server.security import tls
from lapwing_server.security.authenticator import Authenticator
from lapwing_server.security.rates import Rates
from lapwing_server.security.tokens import Tokens
from lapwing_server.security.visitors import Visitors
from lapwing_server.security.watched import Watcher
from lapwing_server.settings import Settings


def authenticator(settings: Settings, shed: Callable[[str], None], watcher: Watcher) -> Authenticator:
    """Who decides who may call.

    Args:
        settings: of the server.
        shed: told the reason of every call that is refused for there being too many.
        watcher: sees when the file of tokens changes.

    Raises:
        UnusableFile: the file of tokens is not as it should be.
    """
    mutual, limits = settings.tls_client_ca is not None, settings.limits
    tokens = Tokens(settings.tokens_file, mutual=mutual) if settings.tokens_file else None
    if tokens is not None:
        watcher.add("tokens_file", tokens.file)
    return Authenticator(
        tokens,
        mutual=mutual,
        trusted=settings.open_admin,
        rates=Rates(settings.requests_per_second, settings.burst),
        visitors=Visitors(limits.public_streams, limits.public_streams_per_client),
        mend=mend(settings),
        shed=shed,
    )


def mend(settings: Settings) -> str:
    """What whoever runs the server can do about a scope that is missing; {scope} stands for it."""
    make = "make a token by lapwing token NAME --scope {scope} --into FILE"
    if settings.tokens_file:
        return make
    make += ", and serve with --tokens-file FILE"
    only_here = is_loopback(settings.host) and not settings.tls_client_ca
    return f"{make}; where nobody else reaches the server, --open-admin does" if only_here else make


def credentials(settings: Settings, watcher: Watcher) -> grpc.ServerCredentials | None:
    """The server's TLS; None when it speaks without.

    Args:
        settings: of the server.
        watcher: sees when certificates change.

    Raises:
        UnusableFile: certificate, key or authorities can't be used.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return tls.credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca, watcher)
