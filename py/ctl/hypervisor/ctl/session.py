"""The connection to the servers, for the length of one command: channel, stubs, deadlines, safe repeats of reads.

One server is used at a time; where several are known, what fails is repeated on the next one.

Everything that goes wrong comes out as an error of :mod:`hypervisor.core.errors`. Mutating calls belong to
:mod:`hypervisor.ctl.calls`, which repeats them by request id.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc

from hypervisor.core.errors import Cancelled, DeadlineExceeded, HypervisorError, InvalidArgument, Unavailable
from hypervisor.ctl.failover import Failover
from hypervisor.ctl.settings import Connection

if TYPE_CHECKING:
    from hypervisor.v1.backup_pb2_grpc import BackupServiceStub
    from hypervisor.v1.cluster_pb2_grpc import ClusterServiceStub
    from hypervisor.v1.compute_pb2_grpc import ComputeServiceStub
    from hypervisor.v1.image_pb2_grpc import ImageServiceStub
    from hypervisor.v1.maintenance_pb2_grpc import MaintenanceServiceStub
    from hypervisor.v1.operation_pb2_grpc import OperationServiceStub

__all__ = ["READ_TIMEOUT_S", "Deadline", "Session", "open_channel", "translated", "was_never_sent"]

READ_TIMEOUT_S = 30.0
_SILENCE_S = 5.0
"""A server that has not answered a read for so long is left for another one, where there is another one."""
_READ_ATTEMPTS = 3
_LONGEST_WAIT_S = 5.0

Request = TypeVar("Request")
Response = TypeVar("Response")


class Deadline:
    """A moment by which everything must have ended, in seconds from now; None: never."""

    def __init__(self, seconds: float | None, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._end = None if seconds is None else monotonic() + seconds

    def left_s(self) -> float | None:
        """Seconds left, at least 0; None without end. What gRPC takes as ``timeout``."""
        return None if self._end is None else max(0.0, self._end - self._monotonic())

    def allows(self, seconds: float) -> bool:
        """Whether that many seconds are left."""
        left = self.left_s()
        return left is None or left > seconds


class Session:
    """Owns the channel; close it (``with``). Not for several threads, but its stubs are."""

    def __init__(
        self,
        connection: Connection,
        *,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self.connection = connection
        self.sleep = sleep
        self._rng = rng or random.Random()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel, if it was opened. Idempotent."""
        channel = self.__dict__.pop("channel", None)
        if channel is not None:
            channel.close()

    @cached_property
    def channel(self) -> Failover:
        """The channel, made at first use; it connects at the first call."""
        return Failover(self.connection.servers, lambda server: open_channel(self.connection, server))

    @cached_property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call: the token, where there is one."""
        token = self.connection.token
        return (("authorization", f"Bearer {token}"),) if token else ()

    @cached_property
    def compute(self) -> "ComputeServiceStub":
        """Instances."""
        from hypervisor.v1.compute_pb2_grpc import ComputeServiceStub

        return ComputeServiceStub(self.channel)

    @cached_property
    def cluster(self) -> "ClusterServiceStub":
        """Nodes and the cluster."""
        from hypervisor.v1.cluster_pb2_grpc import ClusterServiceStub

        return ClusterServiceStub(self.channel)

    @cached_property
    def operations(self) -> "OperationServiceStub":
        """Operations."""
        from hypervisor.v1.operation_pb2_grpc import OperationServiceStub

        return OperationServiceStub(self.channel)

    @cached_property
    def images(self) -> "ImageServiceStub":
        """Images."""
        from hypervisor.v1.image_pb2_grpc import ImageServiceStub

        return ImageServiceStub(self.channel)

    @cached_property
    def maintenance(self) -> "MaintenanceServiceStub":
        """Drains and budgets."""
        from hypervisor.v1.maintenance_pb2_grpc import MaintenanceServiceStub

        return MaintenanceServiceStub(self.channel)

    @cached_property
    def backups(self) -> "BackupServiceStub":
        """Backup and restore."""
        from hypervisor.v1.backup_pb2_grpc import BackupServiceStub

        return BackupServiceStub(self.channel)

    @property
    def server(self) -> str:
        """Address of the server in use, for messages."""
        return self.channel.address

    @property
    def servers(self) -> int:
        """How many servers are known."""
        return len(self.connection.servers)

    def advance(self, past: str) -> None:
        """Use the server after ``past``, if that is still in use; the same one where no other is known."""
        self.channel.advance(past)

    def read(
        self,
        method: "grpc.UnaryUnaryMultiCallable[Request, Response]",
        request: Request,
        *,
        deadline: Deadline | None = None,
    ) -> Response:
        """Call something that changes nothing; repeated a few times while the server says UNAVAILABLE.

        A server that cannot even be connected to, or that says nothing, is left for the next one; when that is so of
        all of them it is an error at once.
        """
        deadline = deadline or Deadline(READ_TIMEOUT_S)
        attempt = passed_over = 0
        while True:
            others = self.servers - 1 - passed_over
            left = deadline.left_s()
            timeout_s = left if others <= 0 else _SILENCE_S if left is None else min(left, _SILENCE_S)
            server = self.server
            try:
                with translated(server):
                    return method(request, timeout=timeout_s, metadata=self.metadata)
            except DeadlineExceeded:
                if others <= 0 or not deadline.allows(0):
                    raise
                passed_over += 1
                self.advance(server)
            except Unavailable as exc:
                if was_never_sent(exc):
                    if others <= 0:
                        raise
                    passed_over += 1
                    self.advance(server)
                    continue
                attempt += 1
                if attempt == _READ_ATTEMPTS or not self.pause(attempt, exc, deadline):
                    raise

    def pause(self, attempt: int, error: HypervisorError, deadline: Deadline) -> bool:
        """Wait before the attempt after number ``attempt``, which is the next server's: False, at once, when the
        deadline forbids it."""
        delay = max(min(0.1 * 2**attempt, 2.0) * (0.5 + self._rng.random() / 2), error.retry_after_s or 0.0)
        if delay > _LONGEST_WAIT_S or not deadline.allows(delay):
            return False
        failed = error.metadata.get("peer", self.server).removeprefix("the server ")
        self.sleep(delay)
        self.advance(failed)
        return True


def was_never_sent(error: HypervisorError) -> bool:
    """Whether the call cannot have reached any server, since no connection was made."""
    text = error.message.lower()
    return error.reason == "PEER_UNREACHABLE" and ("failed to connect" in text or "resolution" in text)


@contextmanager
def translated(server: str) -> Iterator[None]:
    """Turn a failed call into an error of the tree. ``server`` is named where gRPC itself failed."""
    try:
        yield
    except grpc.RpcError as exc:
        from hypervisor.core.grpc_errors import from_rpc_error

        error = from_rpc_error(exc, peer=f"the server {server}")  # type: ignore[arg-type]  # RpcError is a Call too
        if isinstance(error, DeadlineExceeded) and error.reason == DeadlineExceeded.default_reason:
            error = DeadlineExceeded(
                f"the server {server} did not answer in time", metadata=error.metadata, reason=error.reason
            )
        if (
            isinstance(error, Cancelled)
            and error.reason == Cancelled.default_reason
            and not _closed_here(error)
        ):
            error = Unavailable(
                f"the server {server} ended the call, as it does when it stops",
                reason="PEER_UNREACHABLE",
                metadata={"peer": server},
            )
        raise error from exc


def _closed_here(error: Cancelled) -> bool:
    """Whether we cancelled the call ourselves: its channel was closed, or the call was cancelled."""
    return "channel closed" in error.message.lower() or "locally cancelled" in error.message.lower()


def open_channel(connection: Connection, server: str) -> grpc.Channel:
    """A channel to one of the connection's servers. InvalidArgument (CONFIG_INVALID): a certificate cannot be read."""
    alone = len(connection.servers) == 1
    options: list[tuple[str, object]] = [
        ("grpc.primary_user_agent", "hypervisor-ctl"),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.max_receive_message_length", 64 << 20),
        # A server that hangs is noticed while a call waits for it, sooner where another one can take its place.
        ("grpc.keepalive_time_ms", 30_000 if alone else 6_000),
        ("grpc.keepalive_timeout_ms", 10_000 if alone else 3_000),
        # A killed server is noticed by the calls that wait; they connect again soon, not after a minute.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    host = server.rpartition(":")[0]
    if host in ("127.0.0.1", "localhost", "[::1]") or server.startswith("unix:"):
        options.append(("grpc.enable_http_proxy", 0))
    tls = connection.tls
    if tls is None:
        return grpc.insecure_channel(server, options=options)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_pem("ca_file", tls.ca_file),
        private_key=_pem("key_file", tls.key_file),
        certificate_chain=_pem("cert_file", tls.cert_file),
    )
    return grpc.secure_channel(server, credentials, options=options)


def _pem(key: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise InvalidArgument.of_field(
            f"tls.{key}", f"{path} cannot be read: {exc.strerror}", reason="CONFIG_INVALID"
        ) from exc
