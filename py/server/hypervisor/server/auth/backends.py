"""Authenticators: everybody (loopback only, which the configuration holds), bearer tokens, client certificates."""

import hashlib
from collections.abc import Mapping

from hypervisor.core.errors import Unauthenticated
from hypervisor.server.auth.authenticator import Authenticator, Credentials, Principal
from hypervisor.server.config import AuthMode, ServerSettings

__all__ = ["AnonymousAuthenticator", "CertificateAuthenticator", "TokenAuthenticator", "build"]


class AnonymousAuthenticator:
    """Everybody is ``anonymous``."""

    _principal = Principal("anonymous")

    def authenticate(self, credentials: Credentials) -> Principal:
        return self._principal


class TokenAuthenticator:
    """Bearer tokens, one for each caller: ``authorization: Bearer TOKEN``.

    Only digests are kept, and looked up by, so that neither a dump nor the time of a comparison tells a token.
    """

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self._principals = {self._digest(token): Principal(name) for name, token in tokens.items()}

    @staticmethod
    def _digest(token: str) -> bytes:
        return hashlib.sha256(token.encode()).digest()

    def authenticate(self, credentials: Credentials) -> Principal:
        header = credentials.header("authorization")
        if header is None:
            raise Unauthenticated(
                "this server wants a token: send the metadata 'authorization: Bearer TOKEN'",
                reason="TOKEN_MISSING",
            )
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated(
                "the authorization metadata is not of the form 'Bearer TOKEN'", reason="TOKEN_MALFORMED"
            )
        principal = self._principals.get(self._digest(token.strip()))
        if principal is None:
            raise Unauthenticated("the token is not known to this server", reason="TOKEN_UNKNOWN")
        return principal


class CertificateAuthenticator:
    """The common name of the client's certificate, which TLS has verified."""

    def authenticate(self, credentials: Credentials) -> Principal:
        name = credentials.certificate_name()
        if not name:
            raise Unauthenticated(
                "this server wants a client certificate with a common name", reason="CERTIFICATE_MISSING"
            )
        return Principal(name)


def build(settings: ServerSettings) -> Authenticator:
    """The authenticator that ``auth.mode`` asks for."""
    match settings.auth.mode:
        case AuthMode.ANONYMOUS | AuthMode.INSECURE:
            return AnonymousAuthenticator()
        case AuthMode.TOKEN:
            return TokenAuthenticator(
                {name: token.get_secret_value() for name, token in settings.auth.tokens.items()}
            )
        case AuthMode.CERTIFICATE:
            return CertificateAuthenticator()
