"""A console of an instance through its agent: the bidirectional stream as a session of domain values."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager

import grpc

from hypervisor.core.consoles import ConsoleOptions
from hypervisor.core.errors import FailedPrecondition, Unavailable
from hypervisor.core.model import ConsoleSize
from hypervisor.server.agents import (
    ConsoleClosed,
    ConsoleData,
    ConsoleNotice,
    ConsoleOpened,
    ConsoleSkipped,
)
from hypervisor.v1 import instance_pb2
from hypervisor.wire.consoles import console_options_to_wire

__all__ = ["AgentConsole", "open_console"]

Call = grpc.aio.StreamStreamCall[instance_pb2.ConsoleInput, instance_pb2.ConsoleOutput]
Output = ConsoleOpened | ConsoleData | ConsoleSkipped | ConsoleNotice | ConsoleClosed
Translated = Callable[[], AbstractContextManager[None]]
"""Makes errors of ours of what gRPC raises inside."""


class AgentConsole:
    """See ``ConsoleSession``. Made by :func:`open_console`, whose call it owns."""

    def __init__(
        self,
        call: Call,
        opened: ConsoleOpened,
        *,
        translated: Translated,
    ) -> None:
        self._call = call
        self._opened = opened
        self._translated = translated
        self._sending = asyncio.Lock()

    async def output(self) -> AsyncGenerator[Output, None]:
        """What the viewer receives, ``ConsoleOpened`` first; ends after ``ConsoleClosed``. One consumer."""
        yield self._opened
        while True:
            # Not `async for`: grpc.aio forbids it on a call that `read` was used on.
            with self._translated():
                message = await self._call.read()
            if not isinstance(message, instance_pb2.ConsoleOutput):
                break
            event = _event(message)
            if event is not None:
                yield event
            if isinstance(event, ConsoleClosed):
                return
        yield ConsoleClosed("DETACHED")

    async def send(self, data: bytes) -> None:
        """Type bytes; waits while the agent does not take them."""
        await self._write(instance_pb2.ConsoleInput(data=data))

    async def resize(self, size: ConsoleSize) -> None:
        """The viewer's terminal changed."""
        await self._write(
            instance_pb2.ConsoleInput(
                resize=instance_pb2.ConsoleInput.Resize(width=size.width, height=size.height)
            )
        )

    async def grant(self, count: int) -> None:
        """The viewer takes so many more bytes."""
        await self._write(instance_pb2.ConsoleInput(credit=count))

    async def aclose(self) -> None:
        """Detach; idempotent."""
        self._call.cancel()

    async def _write(self, message: instance_pb2.ConsoleInput) -> None:
        try:
            async with self._sending:  # grpc.aio takes one write at a time
                with self._translated():
                    await self._call.write(message)
        except asyncio.InvalidStateError as exc:
            raise FailedPrecondition("the console has ended", reason="CONSOLE_ENDED") from exc


async def open_console(
    call: Call,
    instance_id: str,
    *,
    timeout_s: float,
    options: ConsoleOptions,
    translated: Translated,
) -> AgentConsole:
    """Begin a session on a fresh call; the call is cancelled when that fails."""
    opening = console_options_to_wire(options, instance=instance_id)
    try:
        async with asyncio.timeout(timeout_s):
            with translated():
                await call.write(instance_pb2.ConsoleInput(open=opening))
                first = await call.read()
    except TimeoutError as exc:
        call.cancel()
        raise Unavailable(
            f"the console of {instance_id} was not opened within {timeout_s:g} s",
            reason="NODE_UNREACHABLE",
            retry_after_s=1.0,
        ) from exc
    except BaseException:
        call.cancel()
        raise
    event = _event(first) if isinstance(first, instance_pb2.ConsoleOutput) else None
    if not isinstance(event, ConsoleOpened):
        call.cancel()
        raise Unavailable(
            f"the agent closed the console of {instance_id} at once",
            reason="CONSOLE_ENDED",
            retry_after_s=1.0,
        )
    return AgentConsole(call, event, translated=translated)


def _event(message: instance_pb2.ConsoleOutput) -> Output | None:
    """The domain value of a message; None for kinds this version does not know."""
    match message.WhichOneof("output"):
        case "opened":
            opened = message.opened
            return ConsoleOpened(opened.instance_id, opened.replay_bytes, opened.resizable, opened.position)
        case "data":
            return ConsoleData(message.data)
        case "skipped":
            return ConsoleSkipped(message.skipped.bytes)
        case "notice":
            notice = message.notice
            return ConsoleNotice(notice.reason, notice.message, notice.position)
        case "closed":
            closed = message.closed
            return ConsoleClosed(closed.reason, closed.exit_code if closed.HasField("exit_code") else None)
        case _:
            return None
