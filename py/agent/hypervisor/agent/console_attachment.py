"""A driver's console in the hands of the console holder: handed over, typed into, waited for until its output ends."""

import asyncio
import contextlib
import socket
from typing import Any

import structlog

from hypervisor.agent.console_holder.client import HolderClient
from hypervisor.agent.console_holder.protocol import ConsoleState
from hypervisor.agent.console_pump import ConsolePump
from hypervisor.agent.console_typist import ConsoleTypist
from hypervisor.agent.drivers.driver import Console, ConsoleEndpoint, EndpointConsole
from hypervisor.core.errors import HypervisorError
from hypervisor.core.model import ConsoleSize

__all__ = ["Attachment"]

_CLOSE_S = 2.0

_log = structlog.get_logger(__name__)


class Attachment:
    """One attachment of one run. :meth:`hand_over` and :meth:`ended` again for each holder there is meanwhile."""

    def __init__(self, instance_id: str, run: str, console: Console, holder: HolderClient) -> None:
        self.console = console
        self._instance_id = instance_id
        self._run = run
        self._holder = holder
        self._endpoint: ConsoleEndpoint | None = None
        """What was handed over from here; None also while the holder has it from before."""
        self._pump = None if isinstance(console, EndpointConsole) else ConsolePump(instance_id, console)
        self._pumped: socket.socket | None = None
        self._typist: ConsoleTypist | None = None
        self._run_ended = asyncio.Event()

    def run_ended(self, run: str) -> None:
        """The holder has read all output of that run."""
        if run == self._run:
            self._run_ended.set()
            if self._typist is not None:
                self._typist.close()

    async def hand_over(self, state: ConsoleState) -> None:
        """Give it to the holder, unless that has it from this agent's predecessor or an earlier connection. Raises what
        ``EndpointConsole.endpoint`` raises."""
        self._run_ended.clear()
        if isinstance(self.console, EndpointConsole):
            if state.live and state.run == self._run:
                return
            self._endpoint = self.console.endpoint()
            output, typed = self._endpoint.output, self._endpoint.input
            descriptors = (output,) if typed is None or typed == output else (output, typed)
            await self._holder.attach(
                self._instance_id, run=self._run, descriptors=descriptors, same=typed == output
            )
            return
        if self._pumped is not None:
            self._pumped.close()
        self._pumped, theirs = socket.socketpair()
        with theirs:
            await self._holder.attach(
                self._instance_id, run=self._run, descriptors=(theirs.fileno(),), same=True
            )

    async def ended(self, generation: int) -> bool:
        """Return True when all its output was read, False when the holder is gone. Raises what a pumped console
        raises."""
        waiting: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self._run_ended.wait()),
            asyncio.ensure_future(self._holder.lost(generation)),
        ]
        if self._pump is not None and self._pumped is not None:
            sock, self._pumped = self._pumped, None
            waiting.append(asyncio.ensure_future(self._pump.run(sock)))
        try:
            while True:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if waiting[0] in done:
                    return True
                if waiting[1] in done:
                    return False
                # The pump has ended: the holder will say that it has read everything, unless it is gone too.
                waiting.pop().result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            self._forget_typist()

    async def type(self, data: bytes) -> None:
        """Type. FailedPrecondition (``CONSOLE_ENDED``), Unavailable."""
        if self._typist is None or self._typist.closed:
            self._typist = await self._new_typist()
        await self._typist.type(data)

    async def resize(self, size: ConsoleSize) -> bool:
        """Set the terminal's size; whether there is one. Errors are those of the driver."""
        if self._endpoint is not None and self._endpoint.terminal:
            return await self._holder.resize(self._instance_id, size.width, size.height)
        # Whether it is a terminal that a predecessor handed over, the holder knows.
        inherited = self._pump is None and self._endpoint is None and self.console.resizable
        if inherited and await self._holder.resize(self._instance_id, size.width, size.height):
            return True
        await self.console.resize(size)
        return True

    async def close(self) -> None:
        """Let the driver's console go; the holder keeps what it has. Never raises."""
        self._forget_typist()
        if self._pumped is not None:
            self._pumped.close()
            self._pumped = None
        try:
            # Also while being cancelled: bounded, and the runtime needs to know that the terminal is free.
            async with asyncio.timeout(_CLOSE_S):
                await self.console.close()
        except TimeoutError:
            _log.warning("console_close_slow", instance=self._instance_id)
        except HypervisorError as exc:
            _log.warning("console_close_failed", instance=self._instance_id, reason=exc.reason)
        except Exception:
            _log.exception("console_defect", instance=self._instance_id)

    async def _new_typist(self) -> ConsoleTypist:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            # No credit and beyond everything: it sees no output.
            await self._holder.view(
                self._instance_id, theirs, position=(1 << 62) - 1, read_only=False, credit=0
            )
            ours.setblocking(False)
            typist = await ConsoleTypist.connected(self._instance_id, ours)
            undo.pop_all()
        return typist

    def _forget_typist(self) -> None:
        if self._typist is not None:
            self._typist.close()
            self._typist = None
