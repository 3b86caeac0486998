"""A TCP proxy on loopback that breaks connections on command.

It knows nothing of the protocol it carries, but it can look for bytes: gRPC sends messages uncompressed, so a unique
value in a request is found in the stream.
"""

import asyncio
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

__all__ = ["TcpProxy"]

_CHUNK = 65536


@dataclass(eq=False, slots=True)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    flowing: asyncio.Event
    answers: asyncio.Event
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class TcpProxy:
    """Forwards ``endpoint`` to a port on loopback. Enter with ``async with``.

    ``seen`` is set when the bytes given to ``hold_answers_after`` or ``cut_before`` came by in a request.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._refusing = False
        self._hold_after = b""
        self._cut_before = b""
        self._answer_budgets: list[int] = []
        self._port = 0
        self.seen = asyncio.Event()
        self.accepted = 0
        self.cuts = 0
        self.delay_s = 0.0

    @property
    def endpoint(self) -> str:
        """``host:port`` to connect to."""
        return f"127.0.0.1:{self._port}"

    def cut(self) -> None:
        """Reset every connection."""
        for connection in list(self._connections):
            self._cut(connection)

    def refuse(self) -> None:
        """Reset every connection and each new one at once."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        """Serve new connections again."""
        self._refusing = False

    def redirect(self, target_port: int) -> None:
        """Serve new connections from another port."""
        self._target_port = target_port

    def pause(self) -> None:
        """Let nothing through the connections there are, without closing them; new ones are served."""
        for connection in self._connections:
            connection.flowing.clear()

    def resume(self) -> None:
        """Let everything flow again, what was held back first."""
        self._hold_after = b""
        for connection in self._connections:
            connection.flowing.set()
            connection.answers.set()

    def hold_answers_after(self, marker: bytes) -> None:
        """Deliver the request that contains ``marker``, but nothing of what that connection answers from then on;
        once: the same request on another connection is answered."""
        self._hold_after = marker
        self.seen.clear()

    def cut_before(self, marker: bytes) -> None:
        """Reset the connection instead of delivering the request that contains ``marker``; once."""
        self._cut_before = marker
        self.seen.clear()

    def cut_after_answers(self, *counts: int) -> None:
        """Reset a connection after so many bytes of answers; then, of the connections after it, the next count."""
        self._answer_budgets = list(counts)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        connections = list(self._connections)
        tasks = [task for connection in connections for task in connection.tasks]
        for connection in connections:
            self._cut(connection)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._refusing:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(writer, server_writer, asyncio.Event(), asyncio.Event())
        connection.flowing.set()
        connection.answers.set()
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as group:
                connection.tasks = [
                    group.create_task(self._carry_requests(connection, reader)),
                    group.create_task(self._carry_answers(connection, server_reader)),
                ]
        finally:
            self._cut(connection)

    async def _carry_requests(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        tail = b""
        while data := await _read(reader):
            await connection.flowing.wait()
            window = tail + data
            if self._cut_before and self._cut_before in window:
                self._cut_before = b""
                self.seen.set()
                break
            if self._hold_after and self._hold_after in window:
                self._hold_after = b""
                connection.answers.clear()
                self.seen.set()
            tail = window[-256:]
            await self._forward(connection.server, data)
        self._cut(connection)

    async def _carry_answers(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        while data := await _read(reader):
            await connection.flowing.wait()
            await connection.answers.wait()
            if self._answer_budgets:
                left = self._answer_budgets[0]
                self._answer_budgets[0] = left - len(data)
                if left <= len(data):
                    del self._answer_budgets[0]
                    await self._forward(connection.client, data[:left])
                    break
            await self._forward(connection.client, data)
        self._cut(connection)

    async def _forward(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        try:
            writer.write(data)
            await writer.drain()
        except OSError:
            # The other side of this connection is told by its reader, which sees the end.
            return

    def _cut(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self.cuts += 1
            connection.client.transport.abort()
            connection.server.transport.abort()
            current = asyncio.current_task()
            for task in connection.tasks:
                if task is not current:
                    task.cancel()


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(_CHUNK)
    except OSError:
        return b""
