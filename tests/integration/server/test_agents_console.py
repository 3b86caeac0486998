"""The server's side of a console against agents that send what the test says, over real gRPC."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from hvtest_agent_waiting import within
from hypervisor.core.clock import SystemClock
from hypervisor.core.consoles import ConsoleOptions
from hypervisor.core.errors import HypervisorError, Internal, InvalidArgument, Unimplemented
from hypervisor.core.grpc_errors import code_of, to_status, trailing_metadata
from hypervisor.core.ids import new_id
from hypervisor.core.model import Node
from hypervisor.server.agents import CallContext, ConsoleClosed, ConsoleData, ConsoleOpened, ConsoleSkipped
from hypervisor.server.agents_console import AgentConsole
from hypervisor.server.agents_grpc import AgentPool
from hypervisor.v1 import instance_pb2

Input, Output = instance_pb2.ConsoleInput, instance_pb2.ConsoleOutput
Agent = Callable[[AsyncIterator[instance_pb2.ConsoleInput]], AsyncIterator[bytes]]
OPENED = Output(opened=Output.Opened(instance_id="i-1")).SerializeToString()


@asynccontextmanager
async def _console(agent: Agent, **options: Any) -> AsyncIterator[AgentConsole]:
    """A session with an agent that answers so; a HypervisorError that it raises goes out as its servicer sends it."""

    async def serve(requests: Any, context: Any) -> None:
        try:
            async for message in agent(requests):
                await context.write(message)
        except HypervisorError as exc:
            status = to_status(exc)
            await context.abort(code_of(exc), status.message, trailing_metadata(status))

    method: Any = grpc.stream_stream_rpc_method_handler(serve, request_deserializer=Input.FromString)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("hypervisor.agent.v1.AgentService", {"AttachConsole": method}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    now = SystemClock().now()
    node = Node(
        id=new_id("n"), hostname="node-1", address="127.0.0.1", port=port, created_at=now, updated_at=now
    )
    try:
        async with AgentPool() as pool:
            context = CallContext("x", 20.0)
            session = await pool.agent(node).attach_console("i-1", context, ConsoleOptions(**options))
            yield session
            await session.aclose()
    finally:
        await server.stop(None)


async def _all(session: AgentConsole) -> list[object]:
    async def collect() -> list[object]:
        return [event async for event in session.output()]

    return await within(collect(), what="the console ends")


async def test_output_goes_on_as_it_came_and_all_else_is_understood() -> None:
    data = Output(data=b"hello").SerializeToString()
    # A field that this version does not know, beside the data.
    newer = Output(data=b"more").SerializeToString() + b"\xfa\x7f\x01x"
    unknown = b"\xfa\x7f\x01x"

    async def agent(_: AsyncIterator[instance_pb2.ConsoleInput]) -> AsyncIterator[bytes]:
        for message in (
            OPENED,
            data,
            newer,
            unknown,
            Output(skipped=Output.Skipped(bytes=7)).SerializeToString(),
            Output(closed=Output.Closed(reason="EXITED", exit_code=3)).SerializeToString(),
        ):
            yield message

    async with _console(agent) as session:
        events = await _all(session)

    assert events == [
        ConsoleOpened("i-1", 0, False),
        ConsoleData(b"hello", data),
        ConsoleData(b"more"),
        ConsoleSkipped(7),
        ConsoleClosed("EXITED", 3),
    ]


async def test_a_message_that_is_none_ends_the_console_with_a_clear_error() -> None:
    async def agent(_: AsyncIterator[instance_pb2.ConsoleInput]) -> AsyncIterator[bytes]:
        yield OPENED
        yield b"\x12\x05ab"

    async with _console(agent) as session:
        with pytest.raises(Internal) as ended:
            await _all(session)

    assert ended.value.reason == "MALFORMED_MESSAGE"
    assert "no valid ConsoleOutput" in ended.value.message


async def test_an_agent_without_credit_is_named_as_too_old() -> None:
    async def agent(requests: AsyncIterator[instance_pb2.ConsoleInput]) -> AsyncIterator[bytes]:
        # As the agents before credit did: they did not know `window_bytes` either, and sent as much as there was.
        yield OPENED
        yield Output(data=b"x" * 1000).SerializeToString()
        async for request in requests:
            if request.WhichOneof("input") not in ("open", "data", "resize"):
                raise InvalidArgument.of_field("input", "give data or resize")

    async with _console(agent, window_bytes=1000) as session:
        output = session.output()
        assert isinstance(await anext(output), ConsoleOpened)
        assert await anext(output) == ConsoleData(b"x" * 1000, Output(data=b"x" * 1000).SerializeToString())
        await session.grant(1000)
        with pytest.raises(Unimplemented) as refused:
            await within(anext(output), what="the agent refuses it")

    assert refused.value.reason == "CAPABILITY_MISSING"
    assert "older version" in refused.value.message
    assert "without window_bytes" in refused.value.message


async def test_what_an_agent_says_of_other_input_stays_what_it_is() -> None:
    async def agent(requests: AsyncIterator[instance_pb2.ConsoleInput]) -> AsyncIterator[bytes]:
        yield OPENED
        async for request in requests:
            if request.data:
                raise InvalidArgument.of_field("data", "is not liked")

    async with _console(agent, window_bytes=1000) as session:
        await session.grant(1)
        await session.send(b"x")
        with pytest.raises(InvalidArgument) as refused:
            await _all(session)

    assert refused.value.message == "data: is not liked"
