"""containerd's content store: blobs in and out, and the lease that keeps them while nothing refers to them yet."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta

import grpc.aio
import structlog
from containerd_api.services.content.v1 import content_pb2
from containerd_api.services.leases.v1 import leases_pb2
from google.protobuf import field_mask_pb2

from hypervisor.agent.drivers.containerd.client import Client
from hypervisor.agent.drivers.containerd.oci import MAX_DOCUMENT_BYTES, Descriptor, digest_of, invalid_image
from hypervisor.agent.drivers.uninterrupted import uninterrupted
from hypervisor.core.clock import Clock
from hypervisor.core.errors import AlreadyExists, HypervisorError, NotFound
from hypervisor.core.ids import IdSource

__all__ = ["ContentStore"]

_log = structlog.get_logger()

_LEASE_LIFE = timedelta(hours=1)
"""An import that died leaves nothing behind for longer."""


class ContentStore:
    """Blobs by digest. All methods raise what :meth:`Client.call` raises."""

    def __init__(self, client: Client, *, clock: Clock, new_id: IdSource, timeout_s: float) -> None:
        self._client = client
        self._clock = clock
        self._new_id = new_id
        self._timeout_s = timeout_s

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[str]:
        """Keep what is made under this lease from being collected inside the ``async with``."""
        expires = (self._clock.now() + _LEASE_LIFE).strftime("%Y-%m-%dT%H:%M:%SZ")
        lease = self._new_id("l")
        request = leases_pb2.CreateRequest(id=lease, labels={"containerd.io/gc.expire": expires})
        try:
            await uninterrupted(self._client.call(self._client.leases.Create, request, what="begin a lease"))
            yield lease
        except BaseException:
            # With `sync` what the failed work made is gone when this returns, and not some time later.
            await uninterrupted(self._end_lease(lease, sync=True))
            raise
        await uninterrupted(self._end_lease(lease, sync=False))

    async def _end_lease(self, lease: str, *, sync: bool) -> None:
        try:
            await self._client.call(
                self._client.leases.Delete, leases_pb2.DeleteRequest(id=lease, sync=sync), what="end a lease"
            )
        except NotFound:
            return
        except HypervisorError as exc:
            # The work is done or has failed already, and the lease expires by itself.
            _log.warning("containerd_lease_not_ended", lease=lease, error=str(exc))

    async def write(
        self, descriptor: Descriptor, chunks: Iterator[bytes], *, labels: Mapping[str, str], lease: str
    ) -> None:
        """Store a blob; one that is there already is left alone. containerd verifies digest and size.

        ``chunks`` is read in a thread. After a failure nothing of the blob is left.
        """
        reference = self._new_id("w")
        what = f"store {descriptor.digest}"
        try:
            async with self._client.errors(what):
                await self._stream(descriptor, chunks, reference=reference, labels=labels, lease=lease)
        except AlreadyExists:
            return
        except BaseException:
            await uninterrupted(self._abort(reference))
            raise

    async def _stream(
        self,
        descriptor: Descriptor,
        chunks: Iterator[bytes],
        *,
        reference: str,
        labels: Mapping[str, str],
        lease: str,
    ) -> None:
        call = self._client.content.Write(
            None, timeout=self._timeout_s, metadata=self._client.metadata(lease)
        )
        try:
            status = await self._exchange(
                call,
                content_pb2.WriteContentRequest(
                    action=content_pb2.STAT, ref=reference, total=descriptor.size, expected=descriptor.digest
                ),
            )
            offset = status.offset
            # A new reference that is complete already: another namespace has the blob and shares it.
            while offset < descriptor.size:
                data = await asyncio.to_thread(next, chunks, b"")
                if not data:
                    break
                await self._exchange(
                    call,
                    content_pb2.WriteContentRequest(
                        action=content_pb2.WRITE, ref=reference, offset=offset, data=data
                    ),
                )
                offset += len(data)
            await self._exchange(
                call,
                content_pb2.WriteContentRequest(
                    action=content_pb2.COMMIT,
                    ref=reference,
                    offset=offset,
                    total=descriptor.size,
                    expected=descriptor.digest,
                    labels=dict(labels),
                ),
            )
        finally:
            call.cancel()

    async def _exchange(
        self,
        call: "grpc.aio.StreamStreamCall[content_pb2.WriteContentRequest, content_pb2.WriteContentResponse]",
        request: content_pb2.WriteContentRequest,
    ) -> content_pb2.WriteContentResponse:
        try:
            await call.write(request)
            reply = await call.read()
        except asyncio.InvalidStateError:
            # The server ended the stream before it took the request; reading tells why.
            reply = await call.read()
        if not isinstance(reply, content_pb2.WriteContentResponse):
            code, details = await call.code(), await call.details()
            raise grpc.aio.AioRpcError(
                code, grpc.aio.Metadata(), grpc.aio.Metadata(), details or "the stream ended early", None
            )
        return reply

    async def _abort(self, reference: str) -> None:
        try:
            await self._client.call(
                self._client.content.Abort,
                content_pb2.AbortRequest(ref=reference),
                what="drop a partial blob",
            )
        except HypervisorError:
            # The lease's end collects it; the error that led here is the one to show.
            return

    async def read(self, descriptor: Descriptor, *, image: str, title: str) -> bytes:
        """A document (manifest, index, configuration) of an image; verified."""
        if descriptor.size > MAX_DOCUMENT_BYTES:
            raise invalid_image(
                image, f"its {title} is {descriptor.size} bytes long; at most {MAX_DOCUMENT_BYTES}"
            )
        parts: list[bytes] = []
        length = 0
        try:
            async with self._client.errors(f"read {descriptor.digest}"):
                call = self._client.content.Read(
                    content_pb2.ReadContentRequest(digest=descriptor.digest),
                    timeout=self._timeout_s,
                    metadata=self._client.metadata(),
                )
                async for reply in call:
                    parts.append(reply.data)
                    length += len(reply.data)
                    if length > MAX_DOCUMENT_BYTES:
                        call.cancel()
                        break
        except NotFound as exc:
            raise invalid_image(
                image, f"its {title} {descriptor.digest} is not on this node: import it again"
            ) from exc
        data = b"".join(parts)
        if digest_of(data) != descriptor.digest:
            raise invalid_image(image, f"its {title} does not have the digest {descriptor.digest}")
        return data

    async def label(self, digest: str, labels: Mapping[str, str]) -> None:
        """Add labels to a blob."""
        await self._client.call(
            self._client.content.Update,
            content_pb2.UpdateRequest(
                info=content_pb2.Info(digest=digest, labels=dict(labels)),
                update_mask=field_mask_pb2.FieldMask(paths=[f"labels.{key}" for key in labels]),
            ),
            what=f"label {digest}",
        )
