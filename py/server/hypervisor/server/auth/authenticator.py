"""The Authenticator contract.

*credentials*  what came with one call: its metadata (HTTP headers at the gateway) and the name in the certificate
               that the peer proved to own in the TLS handshake.
*principal*    who the caller is, as it stands in operations and in the log.
"""

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Authenticator", "Credentials", "Principal"]


class Credentials(Protocol):
    """What came with a call; looked at lazily, as most backends need one part only."""

    def header(self, name: str) -> str | None:
        """The value of a header (name in lower case), or None."""
        ...

    def certificate_name(self) -> str | None:
        """Common name of the verified client certificate, or None."""
        ...


@dataclass(frozen=True, slots=True)
class Principal:
    """A known caller."""

    name: str


class Authenticator(Protocol):
    """Names the caller. Called once for every call and stream, on the event loop: quick, no I/O, any number at once.

    Raises ``Unauthenticated`` with a sentence that says what credential is wanted.
    """

    def authenticate(self, credentials: Credentials) -> Principal: ...
