"""Consoles and statistics through the server: bytes both ways, sizes, refusals, and clean ends on either side."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from hvtest_agent_waiting import within
from hvtest_whole_cluster import WholeAgent, WholeServer, container, failure_of
from hypervisor.v1 import compute_pb2, instance_pb2

Input, Output = instance_pb2.ConsoleInput, instance_pb2.ConsoleOutput


class Viewer:
    """A viewer's side of a console."""

    def __init__(self, server: WholeServer) -> None:
        self._call: Any = server.compute.AttachConsole()
        self.shown = b""
        self.closed: instance_pb2.ConsoleOutput.Closed | None = None

    async def open(self, instance: str, **more: Any) -> instance_pb2.ConsoleOutput.Opened:
        await self.send(Input(open=Input.Open(instance=instance, **more)))
        first = await within(self._call.read(), what="the console opens")
        assert first.WhichOneof("output") == "opened"
        opened: instance_pb2.ConsoleOutput.Opened = first.opened
        return opened

    async def send(self, message: instance_pb2.ConsoleInput) -> None:
        await self._call.write(message)

    async def type(self, text: bytes) -> None:
        await self.send(Input(data=text))

    async def until(self, wanted: bytes) -> None:
        while wanted not in self.shown:
            assert await self.read(), f"the console ended after {self.shown[-200:]!r}"

    async def read(self) -> bool:
        message = await within(self._call.read(), what="output of the console")
        if message is grpc.aio.EOF:
            return False
        if message.WhichOneof("output") == "data":
            assert len(message.data) <= 64 << 10
            self.shown += message.data
        elif message.WhichOneof("output") == "closed":
            self.closed = message.closed
        return True

    async def failure(self) -> tuple[grpc.StatusCode, str, str]:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await self._to_the_end()
        error = failure_of(failed.value)
        return failed.value.code(), error.reason, error.message

    async def _to_the_end(self) -> None:
        while await self.read():
            pass

    def leave(self) -> None:
        self._call.cancel()


async def test_bytes_go_both_ways_and_sizes_arrive(server: WholeServer, agent: WholeAgent) -> None:
    made = await server.compute.CreateInstance(container("web", "sh"))
    viewer = Viewer(server)

    opened = await viewer.open("web", replay_bytes=-1, size=Input.Resize(width=100, height=40))
    assert (opened.instance_id, opened.resizable) == (made.object_id, True)
    await viewer.until(b"fake guest ready")
    await viewer.type(b"echo hello\n")
    await viewer.until(b"\nhello")
    await viewer.send(Input(resize=Input.Resize(width=120, height=50)))
    await viewer.type(b"stty size\n")
    await viewer.until(b"50 120")
    viewer.leave()


async def test_a_large_output_arrives_whole(server: WholeServer, agent: WholeAgent) -> None:
    await server.compute.CreateInstance(container("web", "sh"))
    viewer = Viewer(server)
    await viewer.open("web")

    await viewer.type(b"spew 200000\n")
    while len(viewer.shown) < 200_000:
        assert await viewer.read()

    viewer.leave()


async def test_the_end_of_the_instance_ends_the_console(server: WholeServer, agent: WholeAgent) -> None:
    await server.compute.CreateInstance(container("web", "sh"))
    viewer = Viewer(server)
    await viewer.open("web")

    await viewer.type(b"exit 3\n")
    while await viewer.read():
        pass

    assert viewer.closed is not None
    assert (viewer.closed.reason, viewer.closed.exit_code) == ("EXITED", 3)


async def test_one_viewer_leaves_and_the_other_stays(server: WholeServer, agent: WholeAgent) -> None:
    await server.compute.CreateInstance(container("web", "sh"))
    one, other = Viewer(server), Viewer(server)
    await one.open("web")
    await other.open("web")

    one.leave()
    await other.type(b"echo still here\n")

    await other.until(b"\nstill here")
    other.leave()


@pytest.mark.parametrize(
    ("message", "reason", "sentence"),
    [
        (Input(data=b"x" * 70_000), "INVALID_FIELD", "data: is 70000 bytes long: send at most 65536"),
        (
            Input(resize=Input.Resize(width=0, height=9)),
            "INVALID_FIELD",
            "resize.width: is 0: use 1 to 10000",
        ),
        (Input(open=Input.Open(instance="web")), "INVALID_FIELD", "open: may only be sent once"),
    ],
)
async def test_a_viewers_fault_ends_its_session_with_the_reason(
    server: WholeServer, agent: WholeAgent, message: instance_pb2.ConsoleInput, reason: str, sentence: str
) -> None:
    await server.compute.CreateInstance(container("web", "sh"))
    viewer = Viewer(server)
    await viewer.open("web")

    await viewer.send(message)

    code, shown, words = await viewer.failure()
    assert (code, shown) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert sentence in words


async def test_who_only_looks_may_not_type(server: WholeServer, agent: WholeAgent) -> None:
    await server.compute.CreateInstance(container("web", "sh"))
    viewer = Viewer(server)
    await viewer.open("web", read_only=True)

    await viewer.type(b"x")

    code, reason, _ = await viewer.failure()
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CONSOLE_READ_ONLY")


async def test_a_console_begins_with_open(server: WholeServer) -> None:
    viewer = Viewer(server)
    await viewer.type(b"x")

    code, reason, _ = await viewer.failure()
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CONSOLE_NOT_OPENED")


async def test_a_stopped_instance_has_no_console(server: WholeServer, agent: WholeAgent) -> None:
    request = container("web")
    request.instance.desired_state = instance_pb2.DESIRED_STATE_STOPPED
    await server.compute.CreateInstance(request)
    viewer = Viewer(server)
    await viewer.send(Input(open=Input.Open(instance="web")))

    code, reason, _ = await viewer.failure()
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_RUNNING")


async def test_samples_come_at_the_interval_until_the_instance_ends(
    server: WholeServer, agent: WholeAgent
) -> None:
    await server.compute.CreateInstance(container("web"))
    request = compute_pb2.WatchInstanceStatsRequest(instance="web", interval=Duration(nanos=100_000_000))
    call: Any = server.compute.WatchInstanceStats(request)

    samples = [await within(call.read(), what="a sample") for _ in range(3)]
    assert [s.sampled_at.ToNanoseconds() for s in samples] == sorted(
        {s.sampled_at.ToNanoseconds() for s in samples}
    )
    await server.compute.StopInstance(compute_pb2.StopInstanceRequest(instance="web"))
    while await within(call.read(), what="the end of the stream") is not grpc.aio.EOF:
        pass

    assert await call.code() is grpc.StatusCode.OK


async def test_a_watch_may_begin_with_the_past(server: WholeServer, agent: WholeAgent) -> None:
    await server.compute.CreateInstance(container("web"))
    request = compute_pb2.WatchInstanceStatsRequest(
        instance="web", interval=Duration(nanos=100_000_000), history=Duration(seconds=60)
    )

    async def replayed() -> list[int]:
        call: Any = server.compute.WatchInstanceStats(request)
        told = [await within(call.read(), what="a sample") for _ in range(3)]
        call.cancel()
        return [sample.sampled_at.ToNanoseconds() for sample in told]

    before = await replayed()
    later = await replayed()

    # The second watch began where the first had begun; which samples of a late sampler follow depends on its delays.
    assert later[0] == before[0]
    assert (before, later) == (sorted(set(before)), sorted(set(later)))


async def test_too_short_an_interval_is_refused(server: WholeServer, agent: WholeAgent) -> None:
    request = compute_pb2.WatchInstanceStatsRequest(instance="web", interval=Duration(nanos=1))
    call: Any = server.compute.WatchInstanceStats(request)

    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call.read()

    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "interval: is 1e-09 s: use 0.1 to 60 s" in (failed.value.details() or "")


async def test_the_server_ends_streams_when_it_stops(server: WholeServer, agent: WholeAgent) -> None:
    await server.compute.CreateInstance(container("web", "sh"))
    viewer = Viewer(server)
    await viewer.open("web")

    reading = asyncio.ensure_future(viewer.failure())
    server.stop.set()

    code, reason, message = await within(reading, what="the stream ends")
    assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")
    assert "repeat the call" in message
