"""One viewer's connection to the console holder: frames in, credit out.

It reads when it is asked to and not when something comes: what waits meanwhile waits in the socket, where the holder
may add to it without waking anybody. So it holds no more output than one message, and messages are large just when
their reader is busy.
"""

import asyncio
import fcntl
import socket
from array import array
from collections import deque
from termios import FIONREAD

import structlog

from hypervisor.agent.console_items import Data, Skipped
from hypervisor.ext.console_mux.frames import FrameType, OutputCutter, ProtocolError, encode_credit

__all__ = ["CHUNK_BYTES", "MESSAGE_BYTES", "ConsoleLink"]

CHUNK_BYTES = 64 << 10
"""Output that is worth a message of its own: more is not waited for."""
MESSAGE_BYTES = 128 << 10
"""The most output in one piece, where that much is there."""

_log = structlog.get_logger(__name__)


class ConsoleLink:
    """Owns ``sock``, a connected framed viewer of console_mux that may not block.

    ``ended``: the holder has said that nothing follows; ``lost``: it is gone without having said so.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._cutter = OutputCutter()
        self._items: deque[Data | Skipped] = deque()
        self._unsent = b""
        self.waiting_bytes = 0
        """Output that was read and not taken yet."""
        self.ended = False
        self.lost = False

    def grant(self, count: int) -> None:
        """Take so many more bytes."""
        self._unsent += encode_credit(count)
        self._send()

    def fill(self, limit: int = MESSAGE_BYTES) -> None:
        """Read what is there, up to ``limit`` bytes with what is waiting already. Never waits."""
        while not (self.ended or self.lost) and self.waiting_bytes < limit:
            wanted = limit - self.waiting_bytes
            try:
                data = self._sock.recv(wanted)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.lost = True
                return
            self._sort(data)
            if len(data) < wanted:
                return

    def take(self) -> Data | Skipped | None:
        """What comes next of what was read: output that lies together in one piece; None when there is nothing."""
        if not self._items:
            return None
        first = self._items.popleft()
        if isinstance(first, Skipped):
            return first
        pieces = [first.data]
        while self._items and isinstance(following := self._items[0], Data):
            self._items.popleft()
            pieces.append(following.data)
        data = b"".join(pieces) if len(pieces) > 1 else first.data
        self.waiting_bytes -= len(data)
        return Data(data, first.position)

    @property
    def unread_bytes(self) -> int:
        """What waits in the socket, frames' headers included."""
        if self._sock.fileno() < 0:
            return 0
        count = array("i", [0])
        fcntl.ioctl(self._sock, FIONREAD, count)
        return count[0]

    @property
    def is_full(self) -> bool:
        """Whether what is waiting is worth a message, or followed by something else."""
        return (
            self.waiting_bytes >= CHUNK_BYTES
            or self.ended
            or self.lost
            or (len(self._items) > 0 and isinstance(self._items[-1], Skipped))
        )

    async def news(self, wake: asyncio.Event) -> None:
        """Return when there is something to read, or ``wake`` is set by somebody else."""
        loop, fd = asyncio.get_running_loop(), self._sock.fileno()
        if fd < 0:
            return
        loop.add_reader(fd, wake.set)
        try:
            await wake.wait()
        finally:
            # After close() the number may already be somebody else's; close() has unregistered it.
            if self._sock.fileno() == fd:
                loop.remove_reader(fd)

    def close(self) -> None:
        """Let go. Idempotent."""
        fd = self._sock.fileno()
        if fd >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(fd)
            loop.remove_writer(fd)
            self._sock.close()
            self.lost = True

    def _sort(self, data: bytes) -> None:
        try:
            frames = self._cutter.feed(data)
        except ProtocolError as exc:
            _log.error("console_holder_output_refused", error=str(exc))
            self.lost = True
            return
        for frame in frames:
            if frame.type == FrameType.DATA:
                self._items.append(Data(frame.payload, frame.position))
                self.waiting_bytes += len(frame.payload)
            elif frame.type == FrameType.SKIPPED:
                self._items.append(Skipped(int.from_bytes(frame.payload, "little")))
            elif frame.type == FrameType.ENDED:
                self.ended = True

    def _send(self) -> None:
        """Send what is owed; a holder that does not listen now gets it when it does."""
        fd = self._sock.fileno()
        if fd < 0:
            return
        loop = asyncio.get_running_loop()
        try:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            # It is gone: reading says so, after what it had sent.
            self._unsent = b""
        if self._unsent:
            loop.add_writer(fd, self._send)
        else:
            loop.remove_writer(fd)
