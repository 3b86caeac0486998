"""Logs of instances and credit of viewers, through the server."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from hvtest_agent_waiting import within
from hvtest_whole_cluster import WholeAgent, WholeServer, container, failure_of
from hypervisor.v1 import compute_pb2, instance_pb2

Input = instance_pb2.ConsoleInput


class Viewer:
    """A viewer that keeps what it is shown."""

    def __init__(self, server: WholeServer) -> None:
        self.call: Any = server.compute.AttachConsole()
        self.shown = b""

    async def open(self, instance: str, **more: Any) -> instance_pb2.ConsoleOutput.Opened:
        await self.call.write(Input(open=Input.Open(instance=instance, **more)))
        first = await within(self.call.read(), what="the console opens")
        opened: instance_pb2.ConsoleOutput.Opened = first.opened
        return opened

    async def type(self, text: bytes) -> None:
        await self.call.write(Input(data=text))

    async def until(self, wanted: bytes, *, times: int = 1) -> None:
        while self.shown.count(wanted) < times:
            await self.read()

    async def until_bytes(self, count: int) -> None:
        while len(self.shown) < count:
            await self.read()

    async def read(self) -> None:
        message = await within(self.call.read(), what="output of the console")
        assert message is not grpc.aio.EOF, f"the console ended after {self.shown[-200:]!r}"
        self.shown += message.data


async def _logs(server: WholeServer, instance: str, **more: Any) -> list[instance_pb2.InstanceLogChunk]:
    request = instance_pb2.GetInstanceLogsRequest(instance=instance, **more)

    async def collect() -> list[instance_pb2.InstanceLogChunk]:
        return [chunk async for chunk in server.compute.GetInstanceLogs(request)]

    return await within(collect(), what="the log ends")


def _text(chunks: list[instance_pb2.InstanceLogChunk]) -> bytes:
    return b"".join(chunk.data for chunk in chunks)


async def test_the_log_of_an_instance_is_there_after_it_has_stopped(
    server: WholeServer, agent: WholeAgent
) -> None:
    await server.compute.CreateInstance(container("web", "sh"))
    viewer = Viewer(server)
    await viewer.open("web", replay_bytes=-1)
    await viewer.type(b"echo logged words\n")
    await viewer.until(b"logged words\r\n", times=2)
    await server.compute.StopInstance(compute_pb2.StopInstanceRequest(instance="web"))

    whole = _text(await _logs(server, "web"))
    tail = await _logs(server, "web", tail_lines=2)
    followed = await _logs(server, "web", follow=True)

    assert whole.endswith(b"logged words\r\n$ ")
    assert _text(followed) == whole
    assert _text(tail) == b"logged words\r\n$ "
    assert tail[0].position + len(_text(tail)) == len(whole)


async def test_a_log_can_be_followed_to_the_end_of_the_instance(
    server: WholeServer, agent: WholeAgent
) -> None:
    await server.compute.CreateInstance(container("web", "sh"))
    following = asyncio.ensure_future(_logs(server, "web", follow=True))
    viewer = Viewer(server)
    await viewer.open("web", replay_bytes=-1)
    await viewer.type(b"echo followed\n")
    await viewer.until(b"followed\r\n", times=2)
    await viewer.type(b"exit\n")

    chunks = await following

    assert b"followed\r\n" in _text(chunks)
    ends = [chunk.position + len(chunk.data) for chunk in chunks]
    assert [chunk.position for chunk in chunks] == [0, *ends[:-1]], "nothing is missing, nothing comes twice"


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"tail_lines": -1}, "tail_lines"),
        ({"from_position": -5}, "from_position"),
        ({"tail_bytes": -1}, "tail_bytes"),
    ],
)
async def test_an_impossible_part_of_a_log_is_refused(
    server: WholeServer, agent: WholeAgent, wrong: dict[str, int], field: str
) -> None:
    await server.compute.CreateInstance(container("web", "sh"))

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _logs(server, "web", **wrong)

    assert [v.field for v in failure_of(refused.value).violations] == [field]


async def test_the_log_of_what_is_not_there_is_refused(server: WholeServer) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _logs(server, "nothing")

    assert failure_of(refused.value).reason == "INSTANCE_NOT_FOUND"


async def test_a_viewer_gets_no_more_than_it_granted(server: WholeServer, agent: WholeAgent) -> None:
    await server.compute.CreateInstance(container("web", "sh"))
    careful, other = Viewer(server), Viewer(server)
    await careful.open("web", window_bytes=1000)
    await other.open("web")
    await other.type(b"spew 50000\n")
    await other.until_bytes(50_000)
    await careful.until_bytes(1000)
    assert len(careful.shown) == 1000

    await careful.call.write(Input(credit=500))
    await careful.until_bytes(1500)

    assert careful.shown == other.shown[:1500]


async def test_credit_without_a_window_is_refused(server: WholeServer, agent: WholeAgent) -> None:
    await server.compute.CreateInstance(container("web", "sh"))
    viewer = Viewer(server)
    await viewer.open("web")
    await viewer.call.write(Input(credit=500))

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await within(viewer.call.read(), what="the session fails")

    assert [v.field for v in failure_of(refused.value).violations] == ["credit"]


async def test_a_fixed_size_stays_while_its_viewer_is_there(server: WholeServer, agent: WholeAgent) -> None:
    await server.compute.CreateInstance(container("web", "sh"))
    fixed, other = Viewer(server), Viewer(server)
    await fixed.open("web", size=Input.Resize(width=100, height=40), resize_policy=Input.RESIZE_POLICY_FIXED)
    await other.open("web", size=Input.Resize(width=90, height=20))
    await other.type(b"stty size\n")
    await other.until(b"40 100")

    fixed.call.cancel()

    async def set_back() -> None:
        while b"20 90" not in other.shown:
            await other.type(b"stty size\n")
            await other.read()

    await within(set_back(), what="the other's size comes back")
