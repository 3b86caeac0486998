"""Consoles over real gRPC: many viewers, one terminal."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from hvtest_agent_waiting import within
from hypervisor.agent.console_link import MESSAGE_BYTES
from hypervisor.agent.v1 import agent_pb2
from hypervisor.core.grpc_errors import from_rpc_error
from hypervisor.core.ids import new_id
from hypervisor.v1 import instance_pb2

StartAgent = Callable[..., Any]


class Terminal:
    """A viewer: what it sees, and its typing."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.opened: instance_pb2.ConsoleOutput.Opened | None = None
        self.closed: instance_pb2.ConsoleOutput.Closed | None = None
        self.shown = b""
        self.skipped = 0

    async def open(self, instance_id: str, **more: Any) -> None:
        opening = instance_pb2.ConsoleInput.Open(instance=instance_id, **more)
        await self._call.write(instance_pb2.ConsoleInput(open=opening))
        await self.receive()
        assert self.opened is not None

    async def type(self, data: bytes) -> None:
        await self._call.write(instance_pb2.ConsoleInput(data=data))

    async def resize(self, width: int, height: int) -> None:
        size = instance_pb2.ConsoleInput.Resize(width=width, height=height)
        await self._call.write(instance_pb2.ConsoleInput(resize=size))

    async def receive(self) -> bool:
        message = await self._call.read()
        if message is grpc.aio.EOF:
            return False
        match message.WhichOneof("output"):
            case "opened":
                self.opened = message.opened
            case "data":
                assert len(message.data) <= MESSAGE_BYTES
                self.shown += message.data
            case "skipped":
                self.skipped += message.skipped.bytes
            case "closed":
                self.closed = message.closed
        return True

    async def until(self, wanted: bytes, *, times: int = 1) -> None:
        async def collect() -> None:
            while self.shown.count(wanted) < times:
                assert await self.receive(), f"ended before {wanted!r}: {self.shown!r}"

        await within(collect(), what=f"the console shows {wanted!r}")

    async def until_closed(self) -> instance_pb2.ConsoleOutput.Closed:
        async def collect() -> None:
            while await self.receive():
                pass

        await within(collect(), what="the console closes")
        assert self.closed is not None
        return self.closed

    async def error(self) -> Any:
        async def drain() -> None:
            while await self.receive():
                pass

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await within(drain(), what="the session fails")
        return from_rpc_error(caught.value, peer="agent")


@asynccontextmanager
async def _viewer(agent: Any, instance_id: str, **more: Any) -> AsyncIterator[Terminal]:
    call = agent.stub.AttachConsole()
    terminal = Terminal(call)
    try:
        await terminal.open(instance_id, **more)
        yield terminal
    finally:
        call.cancel()


async def _instance(agent: Any, *command: str) -> agent_pb2.InstanceRef:
    request = agent_pb2.CreateInstanceRequest(
        ref=agent_pb2.InstanceRef(id=new_id("i"), generation=1, epoch=1),
        name="web",
        project="default",
        type=instance_pb2.INSTANCE_TYPE_CONTAINER,
        spec=instance_pb2.InstanceSpec(image="fake", memory_mb=64, command=command),
        start=True,
    )
    await agent.stub.CreateInstance(request)
    return request.ref


async def test_viewers_see_the_same_and_each_may_type(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        async with _viewer(agent, ref.id) as first, _viewer(agent, ref.id) as second:
            await first.type(b"echo one\n")
            await second.until(b"one\r\n", times=2)
            await second.type(b"echo two\n")

            await first.until(b"two\r\n", times=2)
            await second.until(b"two\r\n", times=2)


async def test_output_from_before_the_first_viewer_is_replayed(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        async with _viewer(agent, ref.id) as first:
            await first.type(b"echo early\n")
            await first.until(b"early\r\n", times=2)

        async with _viewer(agent, ref.id, replay_bytes=-1) as later:
            assert later.opened is not None
            assert later.opened.replay_bytes >= len(b"fake guest ready")
            await later.until(b"fake guest ready")
            await later.until(b"early\r\n", times=2)


async def test_without_replay_only_new_output_is_shown(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        async with _viewer(agent, ref.id, replay_bytes=-1) as first:
            await first.until(b"$ ")
            async with _viewer(agent, ref.id) as second:
                await second.type(b"echo new\n")
                await second.until(b"new\r\n", times=2)

                assert b"ready" not in second.shown
                assert second.opened is not None
                assert second.opened.replay_bytes == 0


async def test_a_resize_is_seen_inside_whoever_asks(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        size = instance_pb2.ConsoleInput.Resize(width=101, height=37)
        async with _viewer(agent, ref.id, size=size) as viewer:
            assert viewer.opened is not None
            assert viewer.opened.resizable
            await viewer.type(b"stty size\n")
            await viewer.until(b"37 101")
            await viewer.resize(120, 40)
            await viewer.type(b"stty size\n")

            await viewer.until(b"40 120")


async def test_the_end_of_the_instance_closes_viewers_with_its_exit_code(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        async with _viewer(agent, ref.id) as viewer:
            await viewer.type(b"exit 5\n")

            closed = await viewer.until_closed()

    assert (closed.reason, closed.exit_code) == ("EXITED", 5)
    assert b"exit 5" in viewer.shown


async def test_scrollback_outlives_a_stop_and_a_start(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        async with _viewer(agent, ref.id) as viewer:
            await viewer.type(b"echo first run\n")
            await viewer.until(b"first run\r\n", times=2)
        await agent.stub.StopInstance(agent_pb2.StopInstanceRequest(ref=ref))
        await agent.stub.StartInstance(agent_pb2.StartInstanceRequest(ref=ref))

        async with _viewer(agent, ref.id, replay_bytes=-1) as viewer:
            await viewer.until(b"first run\r\n", times=2)
            await viewer.until(b"fake guest ready", times=2)
            await viewer.type(b"echo second run\n")
            await viewer.until(b"second run\r\n", times=2)


async def test_a_delete_closes_viewers(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        async with _viewer(agent, ref.id) as viewer:
            await agent.stub.DeleteInstance(agent_pb2.DeleteInstanceRequest(ref=ref))

            closed = await viewer.until_closed()

    assert closed.reason in ("EXITED", "DELETED")


async def test_the_agents_end_lets_viewers_go(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        call = agent.stub.AttachConsole()
        viewer = Terminal(call)
        await viewer.open(ref.id)
        watching = asyncio.ensure_future(viewer.until_closed())

        await agent.end()
        closed = await watching

    assert closed.reason == "DETACHED"


async def test_a_read_only_viewer_may_look_but_not_type(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        async with _viewer(agent, ref.id, read_only=True, replay_bytes=-1) as looker:
            await looker.until(b"fake guest ready")
            await looker.type(b"exit 1\n")

            error = await looker.error()

        assert error.reason == "CONSOLE_READ_ONLY"
        async with _viewer(agent, ref.id, replay_bytes=-1) as other:
            await other.until(b"fake guest ready")
            assert b"exit 1" not in other.shown


async def test_a_viewer_that_does_not_read_is_moved_forward_and_slows_nobody(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        async with _viewer(agent, ref.id) as slow, _viewer(agent, ref.id, replay_bytes=-1) as quick:
            # Its first prompt: the guest's terminal keeps 1 MiB, so each output is to be over before the next begins.
            await quick.until(b"$ ")
            quick.shown = b""
            for _ in range(24):
                await quick.type(b"spew 1000000\n")
                await quick.until(b"$ ")
                quick.shown = b""
            await quick.type(b"echo finished\n")
            await quick.until(b"finished\r\n", times=2)

            await slow.until(b"finished\r\n", times=2)

    assert slow.skipped > 0
    assert len(slow.shown) + slow.skipped >= 24_000_000


async def test_input_after_the_end_of_typing_is_not_needed_to_keep_watching(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        call = agent.stub.AttachConsole()
        viewer = Terminal(call)
        await viewer.open(ref.id)
        await call.done_writing()
        async with _viewer(agent, ref.id) as other:
            await other.type(b"echo still here\n")

            await viewer.until(b"still here\r\n", times=2)
        call.cancel()


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (instance_pb2.ConsoleInput(data=b"x"), "CONSOLE_NOT_OPENED"),
        (instance_pb2.ConsoleInput(), "CONSOLE_NOT_OPENED"),
        (instance_pb2.ConsoleInput(open=instance_pb2.ConsoleInput.Open()), "INVALID_FIELD"),
        (
            instance_pb2.ConsoleInput(open=instance_pb2.ConsoleInput.Open(instance=new_id("i"))),
            "INSTANCE_NOT_FOUND",
        ),
    ],
)
async def test_a_session_that_does_not_begin_rightly_is_refused(
    start_agent: StartAgent, first: instance_pb2.ConsoleInput, reason: str
) -> None:
    async with start_agent() as agent:
        call = agent.stub.AttachConsole()
        await call.write(first)

        error = await Terminal(call).error()

    assert error.reason == reason


async def test_an_instance_that_does_not_run_has_no_console(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent, "exit", "0")
        call = agent.stub.AttachConsole()
        await call.write(instance_pb2.ConsoleInput(open=instance_pb2.ConsoleInput.Open(instance=ref.id)))

        error = await Terminal(call).error()

    assert error.reason == "NOT_RUNNING"


@pytest.mark.parametrize("size", [(0, 24), (80, 0), (10_001, 24)])
async def test_an_impossible_size_is_refused(start_agent: StartAgent, size: tuple[int, int]) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        async with _viewer(agent, ref.id) as viewer:
            await viewer.resize(*size)

            error = await viewer.error()

    assert [v.field for v in error.violations] == ["resize.width" if size[0] != 80 else "resize.height"]


async def test_a_message_over_64_kib_is_refused(start_agent: StartAgent) -> None:
    async with start_agent() as agent:
        ref = await _instance(agent)
        async with _viewer(agent, ref.id) as viewer:
            await viewer.type(b"x" * ((64 << 10) + 1))

            error = await viewer.error()

    assert [v.field for v in error.violations] == ["data"]
