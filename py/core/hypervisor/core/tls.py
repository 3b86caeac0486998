"""TLS credentials for servers and clients from PEM files, checked before use so that errors name the file.

gRPC itself reports a wrong certificate only in its C core's log, long after start-up; here a missing, unreadable or
mismatched file is an error at once.
"""

import enum
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from hypervisor.core.errors import InvalidArgument

__all__ = [
    "ClientAuth",
    "ClientTls",
    "ServerTls",
    "channel_credentials",
    "client_ssl_context",
    "server_credentials",
    "server_ssl_context",
]


class ClientAuth(enum.StrEnum):
    """Whether a server asks its clients for certificates."""

    NONE = "none"
    """It does not."""
    REQUIRE = "require"
    """A client without a certificate that ``ca_file`` signed is refused in the handshake."""


@dataclass(frozen=True, slots=True)
class ServerTls:
    """A server's identity. ``ca_file`` signs its clients; needed unless ``client_auth`` is ``none``."""

    cert_file: Path
    key_file: Path
    ca_file: Path | None = None
    client_auth: ClientAuth = ClientAuth.NONE


@dataclass(frozen=True, slots=True)
class ClientTls:
    """Whom a client trusts (None: the system's authorities) and, for mutual TLS, its own certificate and key."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise InvalidArgument(
            f"{what} {path} cannot be read: {exc.strerror}",
            reason="TLS_FILE_UNREADABLE",
            metadata={"path": str(path)},
        ) from exc


def _check_pair(cert_file: Path, key_file: Path) -> None:
    """Raise InvalidArgument unless both are PEM and the key belongs to the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert_file, key_file, password=lambda: b"")
    except (ssl.SSLError, OSError) as exc:
        mismatch = isinstance(exc, ssl.SSLError) and exc.reason == "KEY_VALUES_MISMATCH"
        problem = "do not belong together" if mismatch else "are not an unencrypted PEM certificate and key"
        raise InvalidArgument(
            f"the TLS certificate {cert_file} and key {key_file} {problem}",
            reason="TLS_PAIR_INVALID",
            metadata={"cert_file": str(cert_file), "key_file": str(key_file)},
        ) from exc


def _check_authorities(ca_file: Path, pem: bytes) -> None:
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as exc:
        raise InvalidArgument(
            f"the TLS authority file {ca_file} holds no PEM certificate",
            reason="TLS_AUTHORITY_INVALID",
            metadata={"path": str(ca_file)},
        ) from exc


def _authorities(ca_file: Path) -> bytes:
    pem = _read(ca_file, "the TLS authority file")
    _check_authorities(ca_file, pem)
    return pem


def _pair(cert_file: Path, key_file: Path) -> tuple[bytes, bytes]:
    """Key and certificate, as gRPC wants them."""
    key = _read(key_file, "the TLS key")
    cert = _read(cert_file, "the TLS certificate")
    _check_pair(cert_file, key_file)
    return key, cert


def _client_authorities(tls: ServerTls) -> bytes | None:
    if tls.client_auth is ClientAuth.NONE:
        return None
    if tls.ca_file is None:
        raise InvalidArgument(
            "tls.client_auth: require needs tls.ca_file, the authority that signs the clients' certificates",
            reason="TLS_AUTHORITY_MISSING",
        )
    return _authorities(tls.ca_file)


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials for a gRPC server. Raises InvalidArgument that names the file.

    gRPC's Python interface knows no "ask, and verify if given", hence no such value of :class:`ClientAuth`.
    """
    pair = _pair(tls.cert_file, tls.key_file)
    authorities = _client_authorities(tls)
    return grpc.ssl_server_credentials(
        [pair], root_certificates=authorities, require_client_auth=authorities is not None
    )


def server_ssl_context(tls: ServerTls) -> ssl.SSLContext:
    """The same for an HTTP server: TLS 1.2 or newer."""
    _pair(tls.cert_file, tls.key_file)
    authorities = _client_authorities(tls)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls.cert_file, tls.key_file)
    if authorities is not None:
        context.load_verify_locations(cadata=authorities.decode("ascii"))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def channel_credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    """Credentials for a gRPC channel (agent to server, server to agent, command line). Raises InvalidArgument."""
    if (tls.cert_file is None) != (tls.key_file is None):
        raise InvalidArgument(
            "a client certificate needs both tls.cert_file and tls.key_file: give both or neither",
            reason="TLS_PAIR_INCOMPLETE",
        )
    roots = None if tls.ca_file is None else _authorities(tls.ca_file)
    if tls.cert_file is None or tls.key_file is None:
        return grpc.ssl_channel_credentials(root_certificates=roots)
    key, cert = _pair(tls.cert_file, tls.key_file)
    return grpc.ssl_channel_credentials(root_certificates=roots, private_key=key, certificate_chain=cert)


def client_ssl_context(tls: ClientTls) -> ssl.SSLContext:
    """The same for an HTTP client: TLS 1.2 or newer, the server's name verified."""
    channel_credentials(tls)
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=tls.ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.cert_file is not None and tls.key_file is not None:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context
