"""Heartbeats over one long stream to a server, or as single calls where the server is too old for it."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from hypervisor.v1 import cluster_pb2

if TYPE_CHECKING:
    from hypervisor.v1 import cluster_pb2_grpc

__all__ = ["HeartbeatStream"]


class HeartbeatStream:
    """Heartbeats on one connection. One at a time; the stream is opened by the first, and anew after it failed.

    Errors come as ``grpc.aio.AioRpcError``.
    """

    def __init__(
        self, stub: "cluster_pb2_grpc.ClusterServiceAsyncStub", *, metadata: Sequence[tuple[str, str]]
    ) -> None:
        self._stub = stub
        self._metadata = tuple(metadata)
        self._call: (
            grpc.aio.StreamStreamCall[cluster_pb2.HeartbeatRequest, cluster_pb2.HeartbeatResponse] | None
        ) = None
        self._single = False
        self._turn = asyncio.Lock()

    async def beat(
        self, request: cluster_pb2.HeartbeatRequest, *, timeout_s: float
    ) -> cluster_pb2.HeartbeatResponse:
        """Send one and return its answer. DEADLINE_EXCEEDED when none comes in time."""
        async with self._turn:
            if not self._single:
                try:
                    return await self._on_stream(request, timeout_s=timeout_s)
                except grpc.aio.AioRpcError as exc:
                    if exc.code() is not grpc.StatusCode.UNIMPLEMENTED:
                        raise
                    self._single = True
            return await self._stub.Heartbeat(request, timeout=timeout_s, metadata=self._metadata)

    def close(self) -> None:
        """End the stream; idempotent."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    async def _on_stream(
        self, request: cluster_pb2.HeartbeatRequest, *, timeout_s: float
    ) -> cluster_pb2.HeartbeatResponse:
        if self._call is not None and self._call.done():
            # A stream that ended while nothing was said (a server that stopped) has told nothing of this heartbeat.
            self.close()
        call = self._call
        if call is None:
            call = self._call = self._stub.Heartbeats(metadata=self._metadata)
        try:
            async with asyncio.timeout(timeout_s):
                with suppress(asyncio.InvalidStateError):  # the stream has ended: the read tells why
                    await call.write(request)
                answer = await call.read()
            if isinstance(answer, cluster_pb2.HeartbeatResponse):
                return answer
            code = await call.code()
            if code is grpc.StatusCode.OK:
                code = grpc.StatusCode.UNAVAILABLE
            raise _error(code, await call.details() or "the server ended the stream of heartbeats")
        except grpc.aio.AioRpcError as exc:
            self.close()
            if exc.code() is not grpc.StatusCode.CANCELLED:
                raise
            raise _error(
                grpc.StatusCode.UNAVAILABLE, "the server ended the stream, as it does when it stops"
            ) from exc
        except TimeoutError:
            self.close()
            raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer to a heartbeat in time") from None
        except BaseException:
            # Also of a cancelled caller: its answer must not be taken for the next one's.
            self.close()
            raise


def _error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details, debug_error_string=None
    )
