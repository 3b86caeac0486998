"""A console of an instance through its agent: the bidirectional stream as a session of domain values.

Messages come as bytes: nearly all are output and nothing else, which goes on to the viewer as it came.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from hypervisor.agent.v1 import agent_pb2
from hypervisor.core.consoles import ConsoleOptions
from hypervisor.core.errors import FailedPrecondition, Internal, InvalidArgument, Unavailable, Unimplemented
from hypervisor.core.model import ConsoleSize
from hypervisor.server.agents import (
    ConsoleClosed,
    ConsoleData,
    ConsoleNotice,
    ConsoleOpened,
    ConsoleSkipped,
)
from hypervisor.v1 import instance_pb2
from hypervisor.wire.consoles import console_data_from_wire, console_options_to_wire

__all__ = ["AgentConsole", "attach_method", "open_console"]

Call = grpc.aio.StreamStreamCall[instance_pb2.ConsoleInput, bytes]
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
        self._has_granted = False

    async def output(self) -> AsyncGenerator[Output, None]:
        """What the viewer receives, ``ConsoleOpened`` first; ends after ``ConsoleClosed``. One consumer."""
        yield self._opened
        # One message is read ahead: it comes while the viewer takes the one before.
        reading = self._reading()
        try:
            while True:
                with self._errors():
                    message = await reading
                if not isinstance(message, bytes):
                    break
                reading = self._reading()
                event = _event(message)
                if event is not None:
                    yield event
                if isinstance(event, ConsoleClosed):
                    return
        finally:
            reading.cancel()
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
        self._has_granted = True
        await self._write(instance_pb2.ConsoleInput(credit=count))

    async def aclose(self) -> None:
        """Detach; idempotent."""
        self._call.cancel()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with self._translated():
                yield
        except InvalidArgument as exc:
            # To an agent from before there was credit, it is a message with nothing in it that it knows.
            if not self._has_granted or exc.metadata.get("field") != "input":
                raise
            raise Unimplemented(
                "the agent of this node is of an older version that knows no credit: upgrade it, or attach without"
                " window_bytes",
                reason="CAPABILITY_MISSING",
                metadata={"instance": self._opened.instance_id, "verb": "credit"},
            ) from exc

    def _reading(self) -> "asyncio.Task[object]":
        # Not `async for`: grpc.aio forbids it on a call that `read` was used on.
        task = asyncio.ensure_future(self._call.read())
        task.add_done_callback(_seen)
        return task

    async def _write(self, message: instance_pb2.ConsoleInput) -> None:
        try:
            async with self._sending:  # grpc.aio takes one write at a time
                with self._errors():
                    await self._call.write(message)
        except asyncio.InvalidStateError as exc:
            raise FailedPrecondition("the console has ended", reason="CONSOLE_ENDED") from exc


def _seen(task: "asyncio.Task[object]") -> None:
    """What a read failed with that nobody waited for any more is no defect."""
    if not task.cancelled():
        task.exception()


def attach_method(
    channel: grpc.aio.Channel,
) -> "grpc.aio.StreamStreamMultiCallable[instance_pb2.ConsoleInput, bytes]":
    """AgentService.AttachConsole, whose answers are left encoded."""
    method = agent_pb2.DESCRIPTOR.services_by_name["AgentService"].methods_by_name["AttachConsole"]
    made: grpc.aio.StreamStreamMultiCallable[instance_pb2.ConsoleInput, bytes] = channel.stream_stream(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=instance_pb2.ConsoleInput.SerializeToString,
    )
    return made


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
    try:
        event = _event(first) if isinstance(first, bytes) else None
    except Internal:
        call.cancel()
        raise
    if not isinstance(event, ConsoleOpened):
        call.cancel()
        raise Unavailable(
            f"the agent closed the console of {instance_id} at once",
            reason="CONSOLE_ENDED",
            retry_after_s=1.0,
        )
    return AgentConsole(call, event, translated=translated)


def _event(encoded: bytes) -> Output | None:
    """The domain value of a message; None for kinds this version does not know. Internal (``MALFORMED_MESSAGE``)."""
    data = console_data_from_wire(encoded)
    if data is not None:
        return ConsoleData(data, encoded)
    try:
        message = instance_pb2.ConsoleOutput.FromString(encoded)
    except DecodeError as exc:
        raise Internal(
            "the agent sent console output that is no valid ConsoleOutput: is its version compatible?",
            reason="MALFORMED_MESSAGE",
        ) from exc
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
