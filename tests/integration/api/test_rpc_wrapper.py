"""What surrounds every call, on a service of the test's own with all four shapes of methods."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.wrappers_pb2 import DESCRIPTOR as WRAPPERS
from google.protobuf.wrappers_pb2 import StringValue

from hvtest_agent_waiting import until, within
from hypervisor.core.errors import NotFound
from hypervisor.core.ids import new_id
from hypervisor.server.api.rpc import Call, Dispatcher
from hypervisor.server.auth import AnonymousAuthenticator

SHAPES = ("Single", "Out", "In", "Both")
Outcome = tuple[str, str]


class Recorded:
    """``CallMetrics`` that a test can look at."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def observer(self, method: str) -> Callable[[str, float], None]:
        return lambda code, seconds: self.outcomes.append((method, code)) if seconds >= 0 else None


def service_descriptor() -> Any:
    pool = DescriptorPool()
    pool.AddSerializedFile(WRAPPERS.serialized_pb)
    file = FileDescriptorProto(name="shapes.proto", package="test", dependency=[WRAPPERS.name])
    service = file.service.add(name="Shapes")
    kind = ".google.protobuf.StringValue"
    for name in SHAPES:
        service.method.add(
            name=name,
            input_type=kind,
            output_type=kind,
            client_streaming=name in ("In", "Both"),
            server_streaming=name in ("Out", "Both"),
        )
    pool.Add(file)
    return pool.FindServiceByName("test.Shapes")


class Handlers:
    """``text`` says what to do: fail, break, wait, or say it back."""

    def __init__(self) -> None:
        self.waiting = 0
        self.closed = 0
        self.logged: list[str] = []

    async def act(self, text: str, call: Call) -> Any:
        structlog.get_logger().info("acting", text=text)
        if text == "fail":
            raise NotFound("there is no such thing", reason="THING_NOT_FOUND", metadata={"thing": "x"})
        if text == "break":
            raise RuntimeError("a secret detail")
        if text == "wait":
            self.waiting += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.closed += 1
        return StringValue(value=f"{text} by {call.principal}").SerializeToString()

    async def single(self, request: Any, call: Call) -> Any:
        return await self.act(request.value, call)

    async def out(self, request: Any, call: Call) -> AsyncIterator[Any]:
        yield StringValue(value="first")
        yield await self.act(request.value, call)

    async def inward(self, requests: AsyncIterator[Any], call: Call) -> Any:
        texts = [request.value async for request in requests]
        return await self.act(texts[-1], call)

    async def both(self, requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
        async for request in requests:
            yield await self.act(request.value, call)

    def table(self) -> dict[str, Any]:
        return dict(zip(SHAPES, (self.single, self.out, self.inward, self.both), strict=True))


class Running:
    """The service, served."""

    def __init__(
        self, channel: grpc.aio.Channel, dispatcher: Dispatcher, handlers: Handlers, metrics: Recorded
    ) -> None:
        self.channel = channel
        self.dispatcher = dispatcher
        self.handlers = handlers
        self.metrics = metrics

    def begin(self, shape: str, text: str, **more: Any) -> Any:
        path = f"/test.Shapes/{shape}"
        codec: dict[str, Any] = {
            "request_serializer": StringValue.SerializeToString,
            "response_deserializer": StringValue.FromString,
        }
        request = StringValue(value=text)
        if shape == "Single":
            return self.channel.unary_unary(path, **codec)(request, **more)
        if shape == "Out":
            return self.channel.unary_stream(path, **codec)(request, **more)
        if shape == "In":
            return self.channel.stream_unary(path, **codec)(iter([request]), **more)
        return self.channel.stream_stream(path, **codec)(iter([request]), **more)

    async def ask(self, shape: str, text: str, **more: Any) -> list[str]:
        call = self.begin(shape, text, **more)
        if shape in ("Single", "In"):
            return [(await call).value]
        return [answer.value async for answer in call]


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    handlers, metrics = Handlers(), Recorded()
    dispatcher = Dispatcher(authenticator=AnonymousAuthenticator(), metrics=metrics, new_id=new_id)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((dispatcher.service(service_descriptor(), handlers.table()),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Running(channel, dispatcher, handlers, metrics)
    await server.stop(None)


async def refused(running: Running, shape: str, text: str, **more: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await within(running.ask(shape, text, **more), what="the refusal")
    return failed.value


@pytest.mark.parametrize("shape", SHAPES)
async def test_an_answer_is_given_counted_and_may_be_bytes(running: Running, shape: str) -> None:
    answers = await running.ask(shape, "hello")

    assert answers[-1] == "hello by anonymous"
    assert running.metrics.outcomes == [(shape, "OK")]
    assert running.dispatcher.in_progress == 0


@pytest.mark.parametrize("shape", SHAPES)
async def test_an_error_of_the_tree_arrives_whole(running: Running, shape: str) -> None:
    error = await refused(running, shape, "fail")

    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "there is no such thing")
    assert b"THING_NOT_FOUND" in dict(error.trailing_metadata())["grpc-status-details-bin"]
    assert running.metrics.outcomes == [(shape, "NOT_FOUND")]


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_defect_is_logged_and_withheld(running: Running, shape: str) -> None:
    with structlog.testing.capture_logs() as logs:
        error = await refused(running, shape, "break", metadata=(("x-request-id", "mine"),))

    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.details())
    assert running.metrics.outcomes == [(shape, "INTERNAL")]
    told = [(entry["log_level"], entry["method"]) for entry in logs if entry["event"] == "rpc_failed"]
    assert told == [("error", shape)]


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_client_that_leaves_ends_the_handler(running: Running, shape: str) -> None:
    call = running.begin(shape, "wait")
    await until(lambda: running.handlers.waiting, what="the handler waits")

    call.cancel()

    await until(lambda: running.handlers.closed, what="the handler ends")
    await until(lambda: running.metrics.outcomes, what="the call is counted")
    assert running.metrics.outcomes == [(shape, "CANCELLED")]
    assert running.dispatcher.in_progress == 0


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_deadline_ends_the_handler(running: Running, shape: str) -> None:
    error = await refused(running, shape, "wait", timeout=0.2)

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: running.handlers.closed, what="the handler ends")


@pytest.mark.parametrize("shape", SHAPES)
async def test_stopping_ends_what_goes_on_and_says_so(running: Running, shape: str) -> None:
    waiting = asyncio.ensure_future(refused(running, shape, "wait"))
    await until(lambda: running.handlers.waiting, what="the handler waits")

    running.dispatcher.stop_streams()
    running.dispatcher.stop_calls()

    error = await waiting
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert b"SERVER_STOPPING" in dict(error.trailing_metadata())["grpc-status-details-bin"]
    assert running.handlers.closed == 1


@pytest.mark.parametrize("given", ["mine-1", "x" * 128])
async def test_a_request_id_of_the_caller_is_kept(running: Running, given: str) -> None:
    error = await refused(running, "Single", "fail", metadata=(("x-request-id", given),))

    assert dict(error.trailing_metadata())["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129])
async def test_a_missing_or_endless_request_id_is_replaced(running: Running, given: str) -> None:
    metadata = (("x-request-id", given),) if given else ()
    one = await refused(running, "Single", "fail", metadata=metadata)
    other = await refused(running, "Single", "fail", metadata=metadata)

    ids = [dict(error.trailing_metadata())["x-request-id"] for error in (one, other)]
    assert ids[0] != ids[1]
    assert all(request_id.startswith("r-") for request_id in ids)


def test_a_method_without_a_handler_is_noticed_at_registration() -> None:
    dispatcher = Dispatcher(authenticator=AnonymousAuthenticator(), metrics=Recorded(), new_id=new_id)
    table = Handlers().table()
    del table["Out"]

    with pytest.raises(TypeError, match=r"test\.Shapes: handlers and methods differ: Out"):
        dispatcher.service(service_descriptor(), table)
