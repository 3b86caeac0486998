"""The one connection to containerd: stubs of its gRPC services, deadlines, and its errors as ours.

containerd's services are called directly over its unix socket. Every call carries the namespace, and the lease where
there is one, as metadata. Errors come out as classes of hypervisor.core.errors; see :func:`translate`.
"""

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import grpc
import grpc.aio
from containerd_api.services.containers.v1 import containers_pb2_grpc
from containerd_api.services.content.v1 import content_pb2_grpc
from containerd_api.services.diff.v1 import diff_pb2_grpc
from containerd_api.services.events.v1 import events_pb2_grpc
from containerd_api.services.images.v1 import images_pb2_grpc
from containerd_api.services.leases.v1 import leases_pb2_grpc
from containerd_api.services.snapshots.v1 import snapshots_pb2_grpc
from containerd_api.services.tasks.v1 import tasks_pb2_grpc
from containerd_api.services.version.v1 import version_pb2_grpc

from hypervisor.core.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    HypervisorError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)

__all__ = ["Client", "translate"]

Request = TypeVar("Request", contravariant=True)
Reply = TypeVar("Reply", covariant=True)

_NO_SPACE = "no space left on device"
_DEADLINE = "context deadline exceeded"


class _Method(Protocol[Request, Reply]):
    def __call__(
        self, request: Request, *, timeout: float, metadata: tuple[tuple[str, str], ...]
    ) -> Awaitable[Reply]: ...


def translate(error: grpc.aio.AioRpcError, what: str, *, address: Path) -> HypervisorError:
    """containerd's answer as an error of ours.

    NotFound (``RUNTIME_OBJECT_NOT_FOUND``), AlreadyExists, Unavailable (``DRIVER_UNAVAILABLE``), DeadlineExceeded,
    ResourceExhausted (``DISK_FULL``); all else, of which containerd gives most as UNKNOWN with a text, is
    FailedPrecondition (``RUNTIME_REFUSED``) with containerd's own words.
    """
    code = error.code()
    details = error.details() or code.name
    metadata = {"call": what, "details": details}
    match code:
        case grpc.StatusCode.NOT_FOUND:
            return NotFound(f"{what}: {details}", reason="RUNTIME_OBJECT_NOT_FOUND", metadata=metadata)
        case grpc.StatusCode.ALREADY_EXISTS:
            return AlreadyExists(f"{what}: {details}", reason="RUNTIME_OBJECT_EXISTS", metadata=metadata)
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(
                f"containerd at {address} cannot be reached ({details}): check that it runs and that "
                "containerd.address is right",
                reason="DRIVER_UNAVAILABLE",
                metadata=metadata | {"driver": "containerd"},
                retry_after_s=1.0,
            )
    # A deadline that the shim noticed first comes back as UNKNOWN with this text.
    if code is grpc.StatusCode.DEADLINE_EXCEEDED or _DEADLINE in details:
        return DeadlineExceeded(
            f"containerd at {address} did not answer in time to: {what}",
            reason="DRIVER_TIMEOUT",
            metadata=metadata | {"driver": "containerd"},
        )
    if _NO_SPACE in details:
        return ResourceExhausted(
            f"the node's disk is full ({what}: {details}): free space where containerd keeps its data",
            reason="DISK_FULL",
            metadata=metadata,
        )
    return FailedPrecondition(f"{what}: {details}", reason="RUNTIME_REFUSED", metadata=metadata)


class Client:
    """Stubs over one channel. :meth:`call` is how a unary method is called; streams use :meth:`errors`."""

    def __init__(self, address: Path, *, namespace: str, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._metadata = (("containerd-namespace", namespace),)
        self.channel = grpc.aio.insecure_channel(
            f"unix://{address}",
            options=(
                # The socket's path would be the authority, percent-encoded, which some Go servers refuse.
                ("grpc.default_authority", "localhost"),
                ("grpc.max_receive_message_length", 64 << 20),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ),
        )
        self.containers = containers_pb2_grpc.ContainersStub(self.channel)
        self.content = content_pb2_grpc.ContentStub(self.channel)
        self.diff = diff_pb2_grpc.DiffStub(self.channel)
        self.events = events_pb2_grpc.EventsStub(self.channel)
        self.images = images_pb2_grpc.ImagesStub(self.channel)
        self.leases = leases_pb2_grpc.LeasesStub(self.channel)
        self.snapshots = snapshots_pb2_grpc.SnapshotsStub(self.channel)
        self.tasks = tasks_pb2_grpc.TasksStub(self.channel)
        self.version = version_pb2_grpc.VersionStub(self.channel)

    def metadata(self, lease: str | None = None) -> tuple[tuple[str, str], ...]:
        """What every call carries; with a lease, everything the call makes is kept while the lease lives."""
        return self._metadata if lease is None else (*self._metadata, ("containerd-lease", lease))

    async def call(
        self,
        method: _Method[Request, Reply],
        request: Request,
        *,
        what: str,
        timeout_s: float | None = None,
        lease: str | None = None,
    ) -> Reply:
        """Call a unary method; ``what`` names the work in errors. Raises as :func:`translate` says."""
        async with self.errors(what):
            return await method(
                request,
                timeout=self._timeout_s if timeout_s is None else timeout_s,
                metadata=self.metadata(lease),
            )

    @asynccontextmanager
    async def errors(self, what: str) -> AsyncIterator[None]:
        """Turn errors of gRPC inside into ours."""
        try:
            yield
        except grpc.aio.AioRpcError as exc:
            raise translate(exc, what, address=self._address) from exc
        except grpc.aio.UsageError as exc:
            raise Unavailable(
                f"the connection to containerd was closed before: {what}",
                reason="DRIVER_UNAVAILABLE",
                metadata={"call": what, "driver": "containerd"},
            ) from exc

    async def aclose(self) -> None:
        """Close the channel; calls under way are cancelled. Idempotent."""
        await self.channel.close(None)
