"""Who is calling: the :class:`Authenticator` contract and its implementations. ``build`` picks one by configuration.

What a caller may do (roles) is not decided here.
"""

from hypervisor.server.auth.authenticator import Authenticator, Credentials, Principal
from hypervisor.server.auth.backends import (
    AnonymousAuthenticator,
    CertificateAuthenticator,
    TokenAuthenticator,
    build,
)

__all__ = [
    "AnonymousAuthenticator",
    "Authenticator",
    "CertificateAuthenticator",
    "Credentials",
    "Principal",
    "TokenAuthenticator",
    "build",
]
