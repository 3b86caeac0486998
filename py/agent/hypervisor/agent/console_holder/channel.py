"""One connection of SOCK_SEQPACKET on the event loop: packets in by callback, packets out through a bounded queue."""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable

import structlog

from hypervisor.agent.console_holder.protocol import Packet, ProtocolError, close_all, receive, send

__all__ = ["PacketChannel"]

_QUEUED = 4096
"""Packets that may wait for the other side; one that is so far behind is given up."""
_AT_ONCE = 64

_log = structlog.get_logger(__name__)


class PacketChannel:
    """Owns ``sock``. ``on_packet`` gets what comes, descriptors and all; ``on_close`` is called once, when the
    connection is over, whoever ended it."""

    def __init__(
        self, sock: socket.socket, *, on_packet: Callable[[Packet], None], on_close: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._on_packet = on_packet
        self._on_close = on_close
        self._waiting: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)
        self.closed = False

    def send(self, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
        """Send a packet in its turn. Descriptors are duplicated here: the caller may close its own at once."""
        if self.closed:
            return
        own = tuple(os.dup(fd) for fd in descriptors)
        self._waiting.append((data, own))
        if len(self._waiting) > _QUEUED:
            _log.warning("console_holder_peer_stuck", waiting=len(self._waiting))
            self.close()
        elif len(self._waiting) == 1:
            self._flush()

    def close(self) -> None:
        """End the connection. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, descriptors in self._waiting:
            close_all(descriptors)
        self._waiting.clear()
        self._on_close()

    def _flush(self) -> None:
        while self._waiting:
            data, descriptors = self._waiting[0]
            try:
                send(self._sock, data, descriptors)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            except OSError:
                self.close()
                return
            self._waiting.popleft()
            close_all(descriptors)
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                packet = receive(self._sock)
            except BlockingIOError:
                return
            except (OSError, ProtocolError) as exc:
                if isinstance(exc, ProtocolError):
                    _log.warning("console_holder_packet_refused", error=str(exc))
                self.close()
                return
            if not packet.data:
                close_all(packet.descriptors)
                self.close()
                return
            self._on_packet(packet)
            if self.closed:
                return
