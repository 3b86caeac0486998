"""Typing into a console that the holder has: a viewer's connection that takes no output, for all who type.

Input is apart from output, so that a viewer that does not read can still type. A write is in pieces of at most 4 KiB,
each of which the guest gets whole; who needs larger ones whole takes turns (the hub does).
"""

import asyncio
import socket
from collections import deque
from typing import cast

from hypervisor.core.errors import FailedPrecondition
from hypervisor.ext.console_mux import FrameDecoder
from hypervisor.ext.console_mux.frames import MAX_INPUT_BYTES, FrameType, InputResult, encode_input

__all__ = ["ConsoleTypist"]


class ConsoleTypist(asyncio.Protocol):
    """Made by :meth:`connected`, over a socket whose other end is a framed viewer without credit."""

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._transport: asyncio.WriteTransport | None = None
        self._decoder = FrameDecoder(from_viewer=False)
        self._answers: deque[asyncio.Future[int]] = deque()
        self._room = asyncio.Event()
        self._closed = False

    @classmethod
    async def connected(cls, instance_id: str, sock: socket.socket) -> "ConsoleTypist":
        """Take the socket over."""
        _, typist = await asyncio.get_running_loop().create_unix_connection(
            lambda: cls(instance_id), sock=sock
        )
        return typist

    @property
    def closed(self) -> bool:
        """Whether it is of no use any more."""
        return self._closed

    async def type(self, data: bytes) -> None:
        """Type bytes in order; waits while the guest takes none. FailedPrecondition (``CONSOLE_ENDED``)."""
        for at in range(0, len(data), MAX_INPUT_BYTES):
            piece = data[at : at + MAX_INPUT_BYTES]
            while True:
                self._room.clear()
                result = await self._offer(piece)
                if result == InputResult.ACCEPTED:
                    break
                if result != InputResult.FULL:
                    raise self._ended()
                await self._room.wait()

    def close(self) -> None:
        """Let go; whoever waits is told that the console has ended. Idempotent."""
        if self._transport is not None:
            self._transport.close()
        self._end()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none by inheritance.
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        for frame in self._decoder.feed(data):
            if frame.type == FrameType.INPUT_DONE and self._answers:
                answer = self._answers.popleft()
                if not answer.done():
                    answer.set_result(frame.code)
            elif frame.type == FrameType.INPUT_READY:
                self._room.set()
            elif frame.type == FrameType.ENDED:
                self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    async def _offer(self, piece: bytes) -> int:
        if self._closed or self._transport is None:
            raise self._ended()
        # Kept until answered, also when the one who waits for it leaves: answers come in order.
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        self._transport.write(encode_input(piece))
        return await answer

    def _end(self) -> None:
        self._closed = True
        self._room.set()
        while self._answers:
            answer = self._answers.popleft()
            if not answer.done():
                answer.set_result(InputResult.NO_GUEST)

    def _ended(self) -> FailedPrecondition:
        return FailedPrecondition(
            f"the console of {self._instance_id} has ended: attach again while the instance runs",
            reason="CONSOLE_ENDED",
            metadata={"instance": self._instance_id},
        )
