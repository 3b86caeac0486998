"""The console holder's side of its socket: takes connections, answers requests, and knows when to end."""

import asyncio
import os
import socket
import time
from pathlib import Path

import structlog

from hypervisor.agent.console_holder import protocol
from hypervisor.agent.console_holder.channel import PacketChannel
from hypervisor.agent.console_holder.holding import Holding, Refused
from hypervisor.ext import console_mux

__all__ = ["HolderServer"]

_TICK_S = 0.25

_log = structlog.get_logger(__name__)


class HolderServer:
    """Serves a :class:`Holding` over connections; :meth:`run` until it is over. ``idle_s``: how long it stays without
    an agent when nothing is live; None: for ever."""

    def __init__(self, logs: Path, *, idle_s: float | None) -> None:
        self._holding = Holding(logs, now_ns=time.time_ns, emit=self._emit, on_start=self._started)
        self._event_fd: int | None = None
        self._idle_s = idle_s
        self._channel: PacketChannel | None = None
        self._over = asyncio.Event()
        self._wake = asyncio.Event()
        self._alone_since = time.monotonic()
        self._left_in_order = False
        """The agent has said that it leaves: once nothing is live any more, nobody is waited for."""

    async def run(self, listener: socket.socket | None = None) -> None:
        """Serve until ``Stop``, ``Bye`` with nothing live, idleness, or :meth:`stop`. Closes everything at its end."""
        loop = asyncio.get_running_loop()
        if listener is not None:
            listener.setblocking(False)
            loop.add_reader(listener.fileno(), self._accept, listener)
        try:
            while not self._over.is_set():
                self._wake.clear()
                idle = self._event_fd is None and self._idle_s is None
                try:
                    async with asyncio.timeout(None if idle else _TICK_S):
                        await self._wake.wait()
                except TimeoutError:
                    self._holding.tick()
                    self._end_if_idle()
        finally:
            if listener is not None:
                loop.remove_reader(listener.fileno())
            if self._event_fd is not None:
                loop.remove_reader(self._event_fd)
            if self._channel is not None:
                self._channel.close()
            self._holding.close()

    def serve(self, sock: socket.socket) -> None:
        """A connection. It takes over from the one before, whose agent is gone or will be."""
        if self._channel is not None:
            self._channel.close()
        channel = PacketChannel(
            sock, on_packet=lambda packet: self._packet(channel, packet), on_close=lambda: self._left(channel)
        )
        self._channel = channel
        self._left_in_order = False

    def stop(self) -> None:
        """End as soon as possible."""
        self._over.set()
        self._wake.set()

    def _started(self, event_fd: int) -> None:
        self._event_fd = event_fd
        asyncio.get_running_loop().add_reader(event_fd, self._holding.drain)
        self._wake.set()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        _log.info("console_holder_agent_connected")
        self.serve(sock)

    def _packet(self, channel: PacketChannel, packet: protocol.Packet) -> None:
        try:
            number, request = protocol.decode_request(packet.data)
        except protocol.ProtocolError as exc:
            protocol.close_all(packet.descriptors)
            _log.warning("console_holder_request_refused", error=str(exc))
            channel.close()
            return
        answer: object
        try:
            answer = protocol.Reply(number, protocol.raw(self._answer(request, packet.descriptors)))
        except Refused as exc:
            answer = protocol.Refusal(number, exc.reason, str(exc))
        channel.send(protocol.encode(answer))
        if isinstance(request, protocol.Stop):
            self.stop()
        elif isinstance(request, protocol.Bye):
            self._left_in_order = True

    def _answer(self, request: protocol.Request, descriptors: tuple[int, ...]) -> object:
        match request:
            case protocol.Hello():
                protocol.close_all(descriptors)
                return protocol.HelloReply(
                    protocol.VERSION, os.getpid(), console_mux.implementation, self._holding.states()
                )
            case protocol.Bye() | protocol.Stop():
                protocol.close_all(descriptors)
                return None
            case _:
                return self._holding.handle(request, descriptors)

    def _emit(self, event: protocol.Event) -> None:
        if self._channel is not None:
            self._channel.send(protocol.encode(event))

    def _left(self, channel: PacketChannel) -> None:
        if self._channel is channel:
            self._channel = None
            self._alone_since = time.monotonic()
            _log.info("console_holder_agent_left", live=self._holding.live)
            self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._idle_s is None or self._channel is not None:
            return
        if self._holding.live:
            self._alone_since = time.monotonic()
        elif self._left_in_order or time.monotonic() - self._alone_since >= self._idle_s:
            _log.info("console_holder_idle")
            self.stop()
