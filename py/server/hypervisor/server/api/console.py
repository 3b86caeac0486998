"""ComputeService.AttachConsole and GetInstanceLogs: joins a viewer's stream to the console session of the agent.

Flow control goes through: bytes are read from one side only when the other has taken those before.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from hypervisor.core.errors import FailedPrecondition, HypervisorError, InvalidArgument
from hypervisor.server.agents import (
    ConsoleClosed,
    ConsoleData,
    ConsoleNotice,
    ConsoleOpened,
    ConsoleSkipped,
)
from hypervisor.server.api.instance_requests import ref_of
from hypervisor.server.api.rpc import Call, Handler
from hypervisor.server.api.violations import Violations
from hypervisor.server.services import ConsoleEvent, ConsoleSession, Instances
from hypervisor.v1 import instance_pb2
from hypervisor.wire.consoles import (
    console_data_to_wire,
    console_options_from_wire,
    console_size_from_wire,
    credit_from_wire,
    log_options_from_wire,
    log_piece_to_wire,
)

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
        """AttachConsole and GetInstanceLogs."""
        return {"AttachConsole": self.attach, "GetInstanceLogs": self.logs}

    async def attach(
        self, requests: AsyncIterator[instance_pb2.ConsoleInput], call: Call
    ) -> AsyncIterator[instance_pb2.ConsoleOutput | bytes]:
        opening = await _first(requests)
        wrong = Violations()
        ref = ref_of(opening, prefix="open.", wrong=wrong)
        try:
            options = console_options_from_wire(opening)
        except InvalidArgument as exc:
            wrong.extend(*exc.violations)
        wrong.check()
        session = await self._instances.attach_console(ref, call.caller, options)
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

    async def logs(
        self, request: instance_pb2.GetInstanceLogsRequest, call: Call
    ) -> AsyncIterator[instance_pb2.InstanceLogChunk]:
        """GetInstanceLogs: what the agent has, as it comes."""
        wrong = Violations()
        ref = ref_of(request, wrong=wrong)
        try:
            options = log_options_from_wire(request)
        except InvalidArgument as exc:
            wrong.extend(*exc.violations)
        wrong.check()
        async with aclosing(self._instances.logs(ref, call.caller, options)) as pieces:
            async for piece in pieces:
                yield log_piece_to_wire(piece)


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
        if kind == "credit":
            await self._session.grant(credit_from_wire(request.credit))
        elif self._read_only and kind is not None:
            raise FailedPrecondition(
                "this console was opened read_only: attach again without it to type or resize",
                reason="CONSOLE_READ_ONLY",
                metadata={"field": kind},
            )
        elif kind == "data":
            if len(request.data) > MAX_DATA_BYTES:
                raise InvalidArgument.of_field(
                    "data", f"is {len(request.data)} bytes long: send at most {MAX_DATA_BYTES} in a message"
                )
            await self._session.send(request.data)
        elif kind == "resize":
            await self._session.resize(console_size_from_wire(request.resize, "resize"))


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


def _messages(event: ConsoleEvent) -> tuple[instance_pb2.ConsoleOutput | bytes, ...]:
    match event:
        case ConsoleData(message=bytes() as encoded) if len(event.data) <= MAX_DATA_BYTES:
            return (encoded,)
        case ConsoleData():
            pieces = range(0, len(event.data), MAX_DATA_BYTES)
            return tuple(console_data_to_wire(event.data[at : at + MAX_DATA_BYTES]) for at in pieces)
        case ConsoleOpened():
            opened = _Output.Opened(
                instance_id=event.instance_id,
                replay_bytes=event.replay_bytes,
                resizable=event.resizable,
                position=event.position,
            )
            return (_Output(opened=opened),)
        case ConsoleSkipped():
            return (_Output(skipped=_Output.Skipped(bytes=event.byte_count)),)
        case ConsoleNotice():
            notice = _Output.Notice(reason=event.reason, message=event.message, position=event.position)
            return (_Output(notice=notice),)
        case ConsoleClosed():
            closed = _Output.Closed(reason=event.reason)
            if event.exit_code is not None:
                closed.exit_code = event.exit_code
            return (_Output(closed=closed),)
        case _:
            raise TypeError(f"unknown console event {type(event).__name__}")
