"""One viewer's connection to the console holder: frames in, credit out. Holds no more output than was granted."""

import asyncio
import socket
from collections import deque
from typing import cast

from hypervisor.agent.console_items import Data, Skipped
from hypervisor.ext.console_mux import FrameDecoder
from hypervisor.ext.console_mux.frames import FrameType, encode_credit

__all__ = ["CHUNK_BYTES", "ConsoleLink"]

CHUNK_BYTES = 64 << 10


class ConsoleLink(asyncio.Protocol):
    """Made by :meth:`connected`. ``wake`` is set when there is something to see.

    ``ended``: the holder has said that nothing follows; ``lost``: it is gone without having said so.
    """

    def __init__(self, wake: asyncio.Event) -> None:
        self._wake = wake
        self._decoder = FrameDecoder(from_viewer=False)
        self._items: deque[Data | Skipped] = deque()
        self._transport: asyncio.WriteTransport | None = None
        self.waiting_bytes = 0
        """Output that came and was not taken yet."""
        self.ended = False
        self.lost = False

    @classmethod
    async def connected(cls, sock: socket.socket, wake: asyncio.Event) -> "ConsoleLink":
        """Take the socket over."""
        _, link = await asyncio.get_running_loop().create_unix_connection(lambda: cls(wake), sock=sock)
        return link

    def grant(self, count: int) -> None:
        """Take so many more bytes."""
        if self._transport is not None and not self.lost:
            self._transport.write(encode_credit(count))

    def take(self) -> Data | Skipped | None:
        """What comes next: output that lies together in one piece, up to 64 KiB; None when there is nothing."""
        if not self._items:
            return None
        first = self._items.popleft()
        if isinstance(first, Skipped):
            return first
        pieces, size = [first.data], len(first.data)
        while size < CHUNK_BYTES and self._items:
            following = self._items[0]
            if not isinstance(following, Data):
                break
            room = CHUNK_BYTES - size
            if len(following.data) <= room:
                pieces.append(following.data)
                self._items.popleft()
            else:
                pieces.append(following.data[:room])
                self._items[0] = Data(following.data[room:], following.position + room)
            size += len(pieces[-1])
        self.waiting_bytes -= size
        return Data(b"".join(pieces) if len(pieces) > 1 else first.data, first.position)

    @property
    def is_full(self) -> bool:
        """Whether the next piece is as large as it gets, or followed by something else."""
        return (
            self.waiting_bytes >= CHUNK_BYTES
            or self.ended
            or self.lost
            or any(isinstance(item, Skipped) for item in self._items)
        )

    def close(self) -> None:
        """Let go. Idempotent."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none by inheritance.
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        for frame in self._decoder.feed(data):
            if frame.type == FrameType.DATA:
                self._items.append(Data(frame.payload, frame.position))
                self.waiting_bytes += len(frame.payload)
            elif frame.type == FrameType.SKIPPED:
                self._items.append(Skipped(int.from_bytes(frame.payload, "little")))
            elif frame.type == FrameType.ENDED:
                self.ended = True
        self._wake.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._wake.set()
