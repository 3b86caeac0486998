"""The agent's side of the console holder: connected for as long as the agent runs, again after the holder died.

:meth:`HolderClient.run` must be running. Requests wait until there is a holder, and fail with Unavailable when it goes
before it has answered. A holder that was started anew knows what is in the log files and nothing else: ``generation``
tells one holder from another, and whoever had something attached does that again.
"""

import asyncio
import random
import socket
from collections.abc import Callable
from typing import TypeVar

import msgspec
import structlog

from hypervisor.agent.console_holder import protocol
from hypervisor.agent.console_holder.channel import PacketChannel
from hypervisor.agent.console_holder.launching import Launcher
from hypervisor.agent.console_holder.protocol import ConsoleState
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError, Internal, NotFound, Unavailable
from hypervisor.core.retry import Backoff

__all__ = ["HolderClient"]

_ANSWER_S = 10.0
_HELLO_S = 5.0
_BACKOFF = Backoff(initial_s=0.05, maximum_s=2.0)

T = TypeVar("T")
_log = structlog.get_logger(__name__)


class HolderClient:
    """See the module's docstring. ``on_event`` gets what the holder tells, also what ended while no agent was there."""

    def __init__(
        self,
        launcher: Launcher,
        *,
        clock: Clock,
        rng: random.Random,
        on_event: Callable[[protocol.Event], None],
    ) -> None:
        self._launcher = launcher
        self._clock = clock
        self._rng = rng
        self._on_event = on_event
        self._channel: PacketChannel | None = None
        self._pid = 0
        self._lost = asyncio.Event()
        self._connected = asyncio.Event()
        self._number = 0
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._leaving = False
        self.generation = 0
        """Tells connections apart; also those to one holder."""

    async def run(self) -> None:
        """Stay connected until cancelled; then say good-bye."""
        delays = _BACKOFF.delays(self._rng)
        fresh = False
        try:
            while True:
                try:
                    fresh = not await self._serve(await self._launcher.connect(fresh=fresh))
                    delays = _BACKOFF.delays(self._rng)
                except HypervisorError as exc:
                    _log.error("console_holder_not_started", reason=exc.reason, error=exc.message)
                except OSError as exc:
                    _log.warning("console_holder_not_reached", error=str(exc))
                await self._clock.sleep(next(delays))
        finally:
            await self._leave()

    async def lost(self, generation: int) -> None:
        """Return when the connection of that generation is gone."""
        if self.generation == generation:
            await self._lost.wait()

    async def ready(self) -> int:
        """Return the generation, once there is a holder."""
        await self._connected.wait()
        return self.generation

    async def open(
        self, console: str, *, scrollback: int, log_bytes: int, log_files: int, position: int
    ) -> ConsoleState:
        """Make a console or find it; see protocol.Open. Unavailable."""
        request = protocol.Open(console, scrollback, log_bytes, log_files, position)
        return await self._ask(request, ConsoleState)

    async def attach(
        self, console: str, *, run: str, descriptors: tuple[int, ...], same: bool
    ) -> ConsoleState:
        """Hand a guest's output and input over. The caller keeps its own descriptors."""
        return await self._ask(protocol.Attach(console, run, same), ConsoleState, descriptors)

    async def view(
        self, console: str, sock: socket.socket, *, position: int, read_only: bool, credit: int
    ) -> protocol.ViewReply:
        """Make a viewer of a socket; the caller closes its own descriptor of it."""
        request = protocol.View(console, position, read_only, credit)
        return await self._ask(request, protocol.ViewReply, (sock.fileno(),))

    async def position_at(self, console: str, time_ns: int) -> int:
        """Where the output of this time (since the epoch) and later begins."""
        return (await self._ask(protocol.Locate(console, time_ns, -1), protocol.LocateReply)).position

    async def position_of_lines(self, console: str, lines: int) -> int:
        """Where the last so many lines begin."""
        return (await self._ask(protocol.Locate(console, -1, lines), protocol.LocateReply)).position

    async def read(self, console: str, position: int, limit: int) -> protocol.ReadReply:
        """Output that is kept."""
        return await self._ask(protocol.Read(console, position, limit), protocol.ReadReply)

    async def resize(self, console: str, width: int, height: int) -> bool:
        """Size of an attached terminal; whether there is one."""
        return (await self._ask(protocol.Resize(console, width, height), protocol.ResizeReply)).done

    async def end_viewers(self, console: str, code: int) -> None:
        """Let all viewers go once they have what was printed."""
        await self._ask(protocol.EndViewers(console, code), None)

    async def forget(self, console: str, code: int) -> None:
        """Remove a console and its log."""
        await self._ask(protocol.Forget(console, code), None)

    async def retain(self, consoles: tuple[str, ...]) -> None:
        """Remove all others."""
        await self._ask(protocol.Retain(consoles), None)

    # -- inside ------------------------------------------------------------------------------------------------

    async def _serve(self, sock: socket.socket) -> bool:
        """Use a connection until it is lost; whether its holder was any good."""
        lost = self._lost = asyncio.Event()
        channel = self._channel = PacketChannel(sock, on_packet=self._packet, on_close=self._closed)
        try:
            async with asyncio.timeout(_HELLO_S):
                hello = await self._send(protocol.Hello(protocol.VERSION), protocol.HelloReply)
                if hello.version != protocol.VERSION:
                    _log.warning("console_holder_version", theirs=hello.version, ours=protocol.VERSION)
                    await self._send(protocol.Stop(), None)
                    return False
        except TimeoutError:
            _log.warning("console_holder_silent", timeout_s=_HELLO_S)
            channel.close()
            return False
        except Unavailable:
            return True  # it was just ending: the next one is started
        if self._pid and hello.pid != self._pid:
            _log.warning("console_holder_restarted", pid=hello.pid)
        self._pid = hello.pid
        _log.info(
            "console_holder_connected",
            pid=hello.pid,
            console_mux=hello.implementation,
            consoles=len(hello.consoles),
        )
        self._connected.set()
        await lost.wait()
        return True

    async def _leave(self) -> None:
        self._leaving = True
        if self._channel is not None and not self._channel.closed:
            try:
                async with asyncio.timeout(1.0):
                    await self._send(protocol.Bye(), None)
            except (TimeoutError, HypervisorError) as exc:
                _log.info("console_holder_bye_unheard", error=str(exc))
            self._channel.close()
        await self._launcher.aclose()

    async def _ask(
        self, request: protocol.Request, kind: type[T] | None, descriptors: tuple[int, ...] = ()
    ) -> T:
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self._connected.wait()
                return await self._send(request, kind, descriptors)
        except TimeoutError:
            raise self._unavailable() from None

    async def _send(
        self, request: protocol.Request, kind: type[T] | None, descriptors: tuple[int, ...] = ()
    ) -> T:
        if self._channel is None or self._channel.closed:
            raise self._unavailable()
        self._number += 1
        number = self._number
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._channel.send(protocol.encode_request(number, request), descriptors)
            return msgspec.msgpack.decode(await answer, type=kind)
        finally:
            self._waiting.pop(number, None)

    def _packet(self, packet: protocol.Packet) -> None:
        protocol.close_all(packet.descriptors)
        try:
            answer = protocol.decode_answer(packet.data)
        except protocol.ProtocolError as exc:
            _log.error("console_holder_answer_refused", error=str(exc))
            if self._channel is not None:
                self._channel.close()
            return
        match answer:
            case protocol.Reply(number=number, result=result):
                waiting = self._waiting.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(bytes(result))
            case protocol.Refusal(number=number):
                waiting = self._waiting.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_exception(_error(answer))
            case _:
                self._on_event(answer)

    def _closed(self) -> None:
        self._connected.clear()
        self.generation += 1
        self._lost.set()
        if not self._leaving:
            _log.warning("console_holder_lost", pid=self._pid)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(self._unavailable())

    @staticmethod
    def _unavailable() -> Unavailable:
        return Unavailable(
            "the node's console holder is not there: it is being started, try again",
            reason="CONSOLE_UNAVAILABLE",
            retry_after_s=1.0,
        )


def _error(refusal: protocol.Refusal) -> HypervisorError:
    match refusal.reason:
        case "UNKNOWN_CONSOLE":
            return NotFound(refusal.message, reason="CONSOLE_NOT_FOUND")
        case "NOT_ATTACHED":
            return FailedPrecondition(refusal.message, reason="CONSOLE_NOT_ATTACHED")
        case _:
            return Internal(refusal.message, reason="CONSOLE_HOLDER_REFUSED")
