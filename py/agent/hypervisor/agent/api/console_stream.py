"""AttachConsole: one viewer on the wire. Input and output run side by side; the end of the output ends the call."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import structlog

from hypervisor.agent.console_items import Data, Ended, Notice, Output, Skipped
from hypervisor.agent.console_viewer import Viewer
from hypervisor.agent.consoles import ConsoleHubs
from hypervisor.core.errors import HypervisorError, InvalidArgument, Unimplemented
from hypervisor.core.model import ConsoleSize
from hypervisor.v1 import instance_pb2
from hypervisor.wire.consoles import (
    console_data_to_wire,
    console_options_from_wire,
    console_size_from_wire,
    credit_from_wire,
    log_options_from_wire,
    log_piece_to_wire,
)
from hypervisor.wire.rpc import Call

__all__ = ["ConsoleStreams"]

_MAX_INPUT = 64 << 10

_log = structlog.get_logger(__name__)


class ConsoleStreams:
    """The handler of AttachConsole over the node's console hubs."""

    def __init__(self, hubs: ConsoleHubs) -> None:
        self._hubs = hubs

    async def attach(
        self, requests: AsyncIterator[instance_pb2.ConsoleInput], _: Call
    ) -> AsyncIterator[instance_pb2.ConsoleOutput | bytes]:
        """See ComputeService.AttachConsole; ``open.instance`` is an instance id."""
        opening = await _opening(requests)
        options = console_options_from_wire(opening)
        hub = self._hubs.hub(opening.instance)
        async with hub.view(options) as viewer:
            yield instance_pb2.ConsoleOutput(
                opened=instance_pb2.ConsoleOutput.Opened(
                    instance_id=opening.instance,
                    replay_bytes=viewer.replay_bytes,
                    resizable=viewer.resizable,
                    position=viewer.position,
                )
            )
            typing = asyncio.ensure_future(_take_input(viewer, requests))
            try:
                async for item in viewer.output():
                    yield _wire(item)
            finally:
                typing.cancel()
                await asyncio.wait({typing})
                _note_defect(typing)

    async def logs(
        self, request: instance_pb2.GetInstanceLogsRequest, _: Call
    ) -> AsyncIterator[instance_pb2.InstanceLogChunk]:
        """See ComputeService.GetInstanceLogs; ``instance`` is an instance id."""
        if not request.instance:
            raise InvalidArgument.of_field("instance", "is required: give an instance id")
        options = log_options_from_wire(request)
        async with aclosing(self._hubs.hub(request.instance).logs(options)) as pieces:
            async for piece in pieces:
                yield log_piece_to_wire(piece)


async def _take_input(viewer: Viewer, requests: AsyncIterator[instance_pb2.ConsoleInput]) -> None:
    """Until the viewer sends no more. What is wrong with the input ends the session; its mere end does not."""
    try:
        await _type(viewer, requests)
    except HypervisorError as exc:
        viewer.fail(exc)


async def _type(viewer: Viewer, requests: AsyncIterator[instance_pb2.ConsoleInput]) -> None:
    async for request in requests:
        match request.WhichOneof("input"):
            case "data":
                if len(request.data) > _MAX_INPUT:
                    raise InvalidArgument.of_field(
                        "data", "is longer than 64 KiB: send it in several messages"
                    )
                if request.data:
                    await _write(viewer, request.data)
            case "resize":
                await _resize(viewer, console_size_from_wire(request.resize, "resize"))
            case "credit":
                viewer.grant(credit_from_wire(request.credit))
            case "open":
                raise InvalidArgument.of_field("open", "may only be the first message")
            case _:
                raise InvalidArgument.of_field("input", "give data, resize or credit")


def _note_defect(typing: "asyncio.Future[None]") -> None:
    """A session that ends breaks off the reading of its input; anything else that went wrong there is logged."""
    if not typing.cancelled() and (failure := typing.exception()) is not None:
        _log.info("console_input_ended", error=repr(failure))


async def _write(viewer: Viewer, data: bytes) -> None:
    try:
        await viewer.write(data)
    except HypervisorError as exc:
        # Typed into the end of a run: the output says so with the exit code, or goes on with the next run.
        if exc.reason != "NOT_RUNNING":
            raise


async def _resize(viewer: Viewer, size: ConsoleSize) -> None:
    try:
        await viewer.resize(size)
    except Unimplemented:
        # `opened.resizable` told so; a terminal emulator sends its size all the same.
        return
    except HypervisorError as exc:
        if exc.reason != "NOT_RUNNING":
            raise


async def _opening(requests: AsyncIterator[instance_pb2.ConsoleInput]) -> instance_pb2.ConsoleInput.Open:
    first = await anext(requests, None)
    if first is None or first.WhichOneof("input") != "open":
        raise InvalidArgument(
            "the first message of a console session must be `open`",
            reason="CONSOLE_NOT_OPENED",
            metadata={"field": "open"},
        )
    if not first.open.instance:
        raise InvalidArgument.of_field("open.instance", "is required: give an instance id")
    return first.open


def _wire(item: Output) -> instance_pb2.ConsoleOutput | bytes:
    match item:
        case Data(data=data):
            return console_data_to_wire(data)
        case Skipped(count=count):
            return instance_pb2.ConsoleOutput(skipped=instance_pb2.ConsoleOutput.Skipped(bytes=count))
        case Notice():
            notice = instance_pb2.ConsoleOutput.Notice(
                reason=item.reason, message=item.message, position=item.position
            )
            return instance_pb2.ConsoleOutput(notice=notice)
        case Ended(reason=reason, exit_code=exit_code):
            closed = instance_pb2.ConsoleOutput.Closed(reason=str(reason))
            if exit_code is not None:
                closed.exit_code = exit_code
            return instance_pb2.ConsoleOutput(closed=closed)
