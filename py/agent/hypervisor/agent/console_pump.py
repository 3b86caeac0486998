"""Carries a driver's console that has no descriptors over a socket, so that the console holder can take it too.

Such a console goes with the agent's process. What was read of it and not taken by the holder waits for the next one.
"""

import asyncio
import contextlib
import socket

import structlog

from hypervisor.agent.drivers.driver import Console
from hypervisor.core.errors import HypervisorError

__all__ = ["ConsolePump"]

_CHUNK_BYTES = 64 << 10

_log = structlog.get_logger(__name__)


class ConsolePump:
    """Of one attachment. :meth:`run` may be called again with another socket."""

    def __init__(self, instance_id: str, console: Console) -> None:
        self._instance_id = instance_id
        self._console = console
        self._pending = memoryview(b"")

    async def run(self, sock: socket.socket) -> bool:
        """Carry both ways until the console's output ends (True: the other side has been told so) or the other side is
        gone (False). Raises what the console raises on reading. Owns the socket."""
        sock.setblocking(False)
        typing = asyncio.ensure_future(self._type(sock))
        try:
            return await self._print(sock)
        finally:
            typing.cancel()
            await asyncio.wait({typing})
            sock.close()

    async def _print(self, sock: socket.socket) -> bool:
        loop = asyncio.get_running_loop()
        while True:
            try:
                while self._pending:
                    await self._writable(loop, sock)
                    with contextlib.suppress(BlockingIOError):
                        self._pending = self._pending[sock.send(self._pending) :]
            except OSError:
                return False
            data = await self._console.read(_CHUNK_BYTES)
            if not data:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
                return True
            self._pending = memoryview(data)
            # A guest that never stops printing must not keep the loop from everybody else.
            await asyncio.sleep(0)

    async def _type(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(sock, _CHUNK_BYTES):
                await self._console.write(data)
        except OSError:
            return
        except HypervisorError as exc:
            # It takes no input any more: so the holder is told, and tells the next who types.
            _log.info("console_input_closed", instance=self._instance_id, reason=exc.reason)
        except Exception:
            _log.exception("console_defect", instance=self._instance_id)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RD)

    @staticmethod
    async def _writable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        """Wait until the socket takes something; unlike ``sock_sendall``, a cancelled wait says how much it took."""
        ready = asyncio.Event()
        loop.add_writer(sock.fileno(), ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(sock.fileno())
