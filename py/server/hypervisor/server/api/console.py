"""ComputeService.AttachConsole: joins a viewer's stream to the console session of the agent.

Flow control goes through: bytes are read from one side only when the other has taken those before.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from hypervisor.core.errors import FailedPrecondition, HypervisorError, InvalidArgument
from hypervisor.core.model import ConsoleSize
from hypervisor.server.agents import ConsoleClosed, ConsoleData, ConsoleOpened, ConsoleSkipped
from hypervisor.server.api.instance_requests import console_size, ref_of
from hypervisor.server.api.rpc import Call, Handler
from hypervisor.server.api.violations import Violations
from hypervisor.server.services import ConsoleEvent, ConsoleSession, Instances
from hypervisor.v1 import instance_pb2

__all__ = ["ConsoleHandlers"]

MAX_DATA_BYTES = 64 << 10
_OPEN_TIMEOUT_S = 30.0

_Input = instance_pb2.ConsoleInput
_Output = instance_pb2.ConsoleOutput


class ConsoleHandlers:
    """The handler by method name: :attr:`handlers`."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances

    @property
    def handlers(self) -> dict[str, Handler]:
        """AttachConsole."""
        return {"AttachConsole": self.attach}

    async def attach(
        self, requests: AsyncIterator[instance_pb2.ConsoleInput], call: Call
    ) -> AsyncIterator[instance_pb2.ConsoleOutput]:
        opening = await _first(requests)
        wrong = Violations()
        ref = ref_of(opening, prefix="open.", wrong=wrong)
        size = console_size("open.size", opening.size, wrong) if opening.HasField("size") else None
        wrong.check()
        session = await self._instances.attach_console(
            ref, call.caller, read_only=opening.read_only, replay_bytes=opening.replay_bytes, size=size
        )
        typing = _Typing(requests, session, read_only=opening.read_only)
        # Owned here and awaited below: a task group would cancel this generator while its caller holds it.
        typing_task = asyncio.create_task(typing.run(), name=f"console-input-{call.request_id}")
        try:
            async with aclosing(session.output()) as events:
                async for event in events:
                    for message in _messages(event):
                        yield message
        except HypervisorError:
            # The viewer's own fault ended the session: that is what it should be told.
            if typing.error is None:
                raise
        finally:
            typing_task.cancel()
            await asyncio.wait({typing_task})
            await session.aclose()
        if not typing_task.cancelled():
            typing_task.result()
        if typing.error is not None:
            raise typing.error


class _Typing:
    """Carries what the viewer sends to the session. ``error`` is what the viewer did wrong, if anything."""

    def __init__(
        self,
        requests: AsyncIterator[instance_pb2.ConsoleInput],
        session: ConsoleSession,
        *,
        read_only: bool,
    ) -> None:
        self._requests = requests
        self._session = session
        self._read_only = read_only
        self.error: HypervisorError | None = None

    async def run(self) -> None:
        """Until the viewer has said its last; output goes on after that."""
        try:
            async for request in self._requests:
                await self._carry(request)
        except InvalidArgument as exc:
            await self._end(exc)
        except FailedPrecondition as exc:
            if exc.reason == "CONSOLE_READ_ONLY":
                await self._end(exc)
            # Else the console has ended, which the output tells.
        except HypervisorError as exc:
            await self._end(exc)

    async def _end(self, error: HypervisorError) -> None:
        self.error = error
        await self._session.aclose()

    async def _carry(self, request: instance_pb2.ConsoleInput) -> None:
        kind = request.WhichOneof("input")
        if kind == "open":
            raise InvalidArgument.of_field("open", "may only be sent once, as the first message")
        if self._read_only and kind is not None:
            raise FailedPrecondition(
                "this console was opened read_only: attach again without it to type or resize",
                reason="CONSOLE_READ_ONLY",
                metadata={"field": kind},
            )
        if kind == "data":
            if len(request.data) > MAX_DATA_BYTES:
                raise InvalidArgument.of_field(
                    "data", f"is {len(request.data)} bytes long: send at most {MAX_DATA_BYTES} in a message"
                )
            await self._session.send(request.data)
        elif kind == "resize":
            wrong = Violations()
            size: ConsoleSize = console_size("resize", request.resize, wrong)
            wrong.check()
            await self._session.resize(size)


async def _first(requests: AsyncIterator[instance_pb2.ConsoleInput]) -> instance_pb2.ConsoleInput.Open:
    try:
        async with asyncio.timeout(_OPEN_TIMEOUT_S):
            first = await anext(requests, None)
    except TimeoutError:
        first = None
    if first is None or first.WhichOneof("input") != "open":
        raise InvalidArgument.of_field(
            "open",
            "must be the first message: say which instance's console to attach",
            reason="CONSOLE_NOT_OPENED",
        )
    return first.open


def _messages(event: ConsoleEvent) -> tuple[instance_pb2.ConsoleOutput, ...]:
    match event:
        case ConsoleData():
            pieces = range(0, len(event.data), MAX_DATA_BYTES)
            return tuple(_Output(data=event.data[at : at + MAX_DATA_BYTES]) for at in pieces)
        case ConsoleOpened():
            opened = _Output.Opened(
                instance_id=event.instance_id, replay_bytes=event.replay_bytes, resizable=event.resizable
            )
            return (_Output(opened=opened),)
        case ConsoleSkipped():
            return (_Output(skipped=_Output.Skipped(bytes=event.byte_count)),)
        case ConsoleClosed():
            closed = _Output.Closed(reason=event.reason)
            if event.exit_code is not None:
                closed.exit_code = event.exit_code
            return (_Output(closed=closed),)
        case _:
            raise TypeError(f"unknown console event {type(event).__name__}")
