"""Decides, before a handler runs, who calls and whether they may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from grpc import StatusCode

from lapwing_server.context import Context, at_end, current_call
from lapwing_server.refusal import Refusal
from lapwing_server.security.principals import (
    Principal,
    certificate_names,
    current_principal,
    peer_name,
    somebody,
)
from lapwing_server.security.rates import Rates
from lapwing_server.security.scopes import EVERYTHING, PUBLIC_STREAMS, SCOPES, USERS, Scope
from lapwing_server.security.tokens import Grant, Tokens
from lapwing_server.security.visitors import Visitors

SCHEME: Final = "bearer "


class Authenticator:
    """Stands at the door.

    Args:
        tokens: who may do what; without them everybody who gets through the connection's checks may score and read.
        mutual: whether every client had to show a certificate.
        trusted: whether, without tokens and certificates, everybody may do everything.
        rates: how often somebody may call.
        visitors: counts the open streams of those who need no token; unlimited without it.
        mend: what to do about a missing scope, in which {scope} stands for it.
        shed: told the reason of every call that is refused for there being too many.
    """

    def __init__(
        self,
        tokens: Tokens | None = None,
        *,
        mutual: bool = False,
        trusted: bool = False,
        rates: Rates | None = None,
        visitors: Visitors | None = None,
        mend: str = "",
        shed: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._tokens, self._mutual, self._trusted = tokens, mutual, trusted
        self.rates = Rates() if rates is None else rates
        self.visitors = visitors
        self._mend, self._shed = mend, shed

    def admit(self, method: str, context: Context) -> Principal:
        """Whose call it is, who may make it; from then on `current_principal`. Never waits.

        Args:
            method: full name.

        Raises:
            Refusal: UNAUTHENTICATED, MISSING_SCOPE, RATE_LIMITED or TOO_MANY_STREAMS.
        """
        needed = SCOPES.get(method)
        if needed is Scope.PUBLIC:
            return self._visitor(method, context)
        principal = noted(self._identify(context))
        if needed is None or needed not in principal.scopes:
            raise forbidden(method, needed, principal, self._mend)
        if wait := self.rates.take(principal):
            self._shed("RATE_LIMITED")
            message = f"{principal.name} calls too often; try again in {wait:.3f} s"
            raise Refusal(StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED", message, retry_after=wait)
        return principal

    def _visitor(self, method: str, context: Context) -> Principal:
        principal, visitors = noted(somebody(peer_name(context), frozenset())), self.visitors
        if visitors is not None and method in PUBLIC_STREAMS:
            try:
                visitors.enter(principal.name)
            except Refusal as refusal:
                self._shed(refusal.reason)
                raise
            at_end(context, lambda: visitors.leave(principal.name))
        return principal

    def _identify(self, context: Context) -> Principal:
        token = bearer_token(context) if self._tokens else None
        names = certificate_names(context) if self._mutual else []
        if self._tokens is None:
            if self._mutual:
                return Principal(names[0] if names else "certificate without a name", USERS)
            return somebody(peer_name(context), EVERYTHING if self._trusted else USERS)
        if token is not None:
            return self._valid(self._tokens.bearer(token), "the token")
        if names and (grant := self._tokens.certificate(names)) is not None:
            return self._valid(grant, "the certificate's grant")
        raise unauthenticated("a token is needed, in the metadata: authorization: Bearer TOKEN")

    def _valid(self, grant: Grant | None, what: str) -> Principal:
        assert self._tokens is not None
        if grant is None:
            raise unauthenticated(f"{what} is not known here; it may have been replaced")
        if not self._tokens.valid(grant):
            raise unauthenticated(f"{what} has expired; ask for a new one")
        return grant.principal


def noted(principal: Principal) -> Principal:
    """The principal, from now on that of the running call, also in the log of a call that is refused."""
    current_principal.set(principal)
    if (call := current_call.get()) is not None:
        call.principal = principal.name
    return principal


def bearer_token(context: Context) -> str | None:
    """The token that the call carries; None when it carries nothing.

    Raises:
        Refusal: it carries something else, or two of them.
    """
    values = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    if not values:
        return None
    [value] = values if len(values) == 1 else [""]
    text = value if isinstance(value, str) else ""
    if not text.lower().startswith(SCHEME):
        raise unauthenticated("the metadata must hold one authorization: Bearer TOKEN")
    return text[len(SCHEME) :].strip()


def unauthenticated(message: str) -> Refusal:
    """Nobody knows who calls. Never says the token."""
    return Refusal(StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", message)


def forbidden(method: str, needed: Scope | None, principal: Principal, mend: str = "") -> Refusal:
    """It is known who calls, and that they may not."""
    if needed is None:
        return Refusal(StatusCode.PERMISSION_DENIED, "UNLISTED_METHOD", f"{method} may be called by nobody")
    has = ", ".join(sorted(principal.scopes)) or "none"
    message = f"{method.rpartition('/')[2]} needs the scope {needed}; {principal.name} has {has}"
    message += f"; {mend.format(scope=needed)}" if mend else ""
    return Refusal(StatusCode.PERMISSION_DENIED, "MISSING_SCOPE", message)
