"""The console holder as a process: agents die and come back, and so does it; what a guest prints is all there."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from hvtest_agent_waiting import until, within
from hvtest_cluster_double import ClusterDouble
from hvtest_endpoint_driver import NAME
from hypervisor.agent.console_holder.launching import SOCKET, holders_of
from hypervisor.agent.v1 import agent_pb2, agent_pb2_grpc
from hypervisor.core.ids import new_id
from hypervisor.v1 import instance_pb2

Input, Output = instance_pb2.ConsoleInput, instance_pb2.ConsoleOutput


class Node:
    """A node whose agent can be killed. Its guests are processes of this test, on FIFOs."""

    def __init__(self, directory: Path, server: ClusterDouble) -> None:
        self.data_dir = directory / "agent"
        self.guests = directory / "guests"
        self.guests.mkdir()
        self._server = server
        self.log = directory / "agent.log"

    @asynccontextmanager
    async def agent(self, **settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """One run of the agent, registered."""
        before = len(self._server.registrations)
        values = {
            "agent.data_dir": str(self.data_dir),
            "agent.server_address": self._server.address,
            "agent.port": "0",
            "agent.shutdown_grace": "2s",
            "drivers.enabled": NAME,
            "node.hostname": "node-1",
            "log.format": "json",
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        flags = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "hvtest_endpoint_driver", *flags), stderr=log
            )
        try:
            await until(
                lambda: process.returncode is not None or len(self._server.registrations) > before,
                what="the agent registers",
                timeout_s=30.0,
            )
            assert process.returncode is None, self.log.read_text()
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await within(process.wait(), what="the agent ends", timeout_s=20.0)

    @asynccontextmanager
    async def stub(self) -> AsyncIterator["agent_pb2_grpc.AgentServiceAsyncStub"]:
        """Calls to the agent of now."""
        port = self._server.registrations[-1].node.port
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield agent_pb2_grpc.AgentServiceStub(channel)

    async def create(self) -> str:
        """An instance that runs; returns its id."""
        instance_id = new_id("i")
        request = agent_pb2.CreateInstanceRequest(
            ref=agent_pb2.InstanceRef(id=instance_id, generation=1, epoch=1),
            name="web",
            project="default",
            type=instance_pb2.INSTANCE_TYPE_CONTAINER,
            spec=instance_pb2.InstanceSpec(image="fake", memory_mb=64),
            start=True,
        )
        async with self.stub() as stub:
            await stub.CreateInstance(request)
        return instance_id

    def printing(self, instance_id: str) -> "Guest":
        """What the instance prints from now on."""
        return Guest(self.guests / instance_id / "out")

    def holder(self) -> int:
        """Number of its console holder's process."""
        (pid,) = holders_of(self.data_dir / SOCKET)
        return pid

    def on_disk(self, instance_id: str) -> int:
        """Position up to which its log is written."""
        files = sorted((self.data_dir / "consoles" / instance_id).glob("[0-9]*.log"))
        return int(files[-1].stem) + files[-1].stat().st_size if files else 0

    async def logs(self, instance_id: str, **more: object) -> list[instance_pb2.InstanceLogChunk]:
        """All chunks of its log."""
        request = instance_pb2.GetInstanceLogsRequest(instance=instance_id, **more)  # type: ignore[arg-type]
        async with self.stub() as stub:
            return [chunk async for chunk in stub.GetInstanceLogs(request)]

    async def logged(self, instance_id: str, wanted: bytes) -> bytes:
        """The whole log, once this is in it."""

        async def look() -> bytes:
            while True:
                text = b"".join(chunk.data for chunk in await self.logs(instance_id))
                if wanted in text:
                    return text
                await asyncio.sleep(0.02)

        return await within(look(), what=f"{wanted!r} is logged", timeout_s=20.0)


class Guest:
    """Prints numbered lines into a FIFO, as a guest whose terminal that is."""

    def __init__(self, fifo: Path) -> None:
        self._fd = os.open(fifo, os.O_WRONLY)
        self.lines = 0

    async def print(self, count: int) -> bytes:
        """So many more lines, waiting where nobody reads; returns the last one."""
        line = b""
        for _ in range(count):
            line = b"line %08d\n" % self.lines
            await asyncio.to_thread(os.write, self._fd, line)
            self.lines += 1
        return line

    def expected(self, first: int = 0) -> bytes:
        """All that was printed, from a line on."""
        return b"".join(b"line %08d\n" % number for number in range(first, self.lines))

    def close(self) -> None:
        """The guest's terminal is closed."""
        os.close(self._fd)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with ClusterDouble() as server:
        node = Node(tmp_path, server)
        yield node
        for pid in holders_of(node.data_dir / SOCKET):
            os.kill(pid, signal.SIGKILL)
        await until(lambda: not holders_of(node.data_dir / SOCKET), what="no holder is left")


async def test_nothing_is_lost_while_the_agent_is_killed_and_away(node: Node) -> None:
    async with node.agent() as first:
        instance_id = await node.create()
        guest = node.printing(instance_id)
        await node.logged(instance_id, await guest.print(100))
        holder = node.holder()
        first.kill()
        await first.wait()
        # More than a pipe holds: without the holder the guest would be stuck by now.
        await within(guest.print(10_000), what="the guest prints on without an agent", timeout_s=20.0)

    async with node.agent():
        last = await guest.print(10)
        text = await node.logged(instance_id, last)

        assert node.holder() == holder, "it is the same holder"
        assert text == guest.expected()
    guest.close()


async def test_a_viewer_comes_back_to_the_position_it_left(node: Node) -> None:
    async with node.agent() as first:
        instance_id = await node.create()
        guest = node.printing(instance_id)
        text = await node.logged(instance_id, await guest.print(50))
        first.kill()
        await first.wait()
        await guest.print(5000)

    async with node.agent(), node.stub() as stub:
        call = stub.AttachConsole()
        await call.write(
            Input(open=Input.Open(instance=instance_id, replay_from_position=len(text), read_only=True))
        )
        shown = b""
        while guest.expected(50) != shown:
            message = await within(call.read(), what=f"output after {len(shown)} bytes")
            assert isinstance(message, Output)
            assert message.WhichOneof("output") in ("opened", "data")
            if message.HasField("opened"):
                assert message.opened.position == len(text)
            shown += message.data
        call.cancel()
    guest.close()


async def test_a_holder_that_is_killed_is_replaced_and_viewers_are_told(node: Node) -> None:
    async with node.agent(), node.stub() as stub:
        instance_id = await node.create()
        guest = node.printing(instance_id)
        await node.logged(instance_id, await guest.print(1000))
        call = stub.AttachConsole()
        await call.write(Input(open=Input.Open(instance=instance_id, replay_bytes=-1)))
        shown, notices = b"", []

        async def until_shown(wanted: bytes) -> None:
            nonlocal shown
            while wanted not in shown:
                message = await call.read()
                assert isinstance(message, Output)
                shown += message.data
                if message.HasField("notice"):
                    notices.append(message.notice)

        await within(until_shown(b"line 00000999\n"), what="what was printed")
        await until(lambda: node.on_disk(instance_id) == 1000 * 14, what="it is on disk")
        killed = node.holder()
        os.kill(killed, signal.SIGKILL)
        last = await within(guest.print(1000), what="the guest prints on", timeout_s=20.0)
        await within(until_shown(last), what="what is printed after it", timeout_s=20.0)

        assert shown == guest.expected()
        assert [(n.reason, n.position) for n in notices] == [("HOLDER_RESTARTED", 1000 * 14)]
        assert await node.logged(instance_id, last) == guest.expected()
        assert node.holder() != killed
        call.cancel()
    assert "console_holder_lost" in node.log.read_text()
    guest.close()


async def test_logs_go_through_files_and_restarts_of_everything(node: Node) -> None:
    limits = {"console__log__max_bytes": "8192", "console__log__files": "3"}
    async with node.agent(**limits, agent__console_scrollback="4096"):
        instance_id = await node.create()
        guest = node.printing(instance_id)
        for _ in range(20):
            # Less than the scrollback at a time, so that the disk cannot be too slow.
            await guest.print(200)
            await until(lambda: node.on_disk(instance_id) == guest.lines * 14, what="it is on disk")
        chunks = await node.logs(instance_id)
        guest.close()
    await until(lambda: not holders_of(node.data_dir / SOCKET), what="an idle holder ends", timeout_s=20.0)

    async with node.agent(**limits, agent__console_scrollback="4096"):
        again = await node.logs(instance_id)
        cut = await node.logs(instance_id, from_position=0)
        tail = await node.logs(instance_id, tail_lines=10)

    text = b"".join(chunk.data for chunk in chunks)
    assert 2 * 8192 <= len(text) <= 5 * 8192, "the log is bounded"
    assert text == guest.expected()[-len(text) :]
    assert b"".join(chunk.data for chunk in again) == text
    assert again[0].position == chunks[0].position
    assert cut[0].skipped_bytes == cut[0].position == 4000 * 14 - len(text)
    assert b"".join(chunk.data for chunk in tail) == guest.expected(3990)


async def test_the_socket_is_for_the_owner_alone_and_the_holder_in_its_own_session(node: Node) -> None:
    async with node.agent() as agent:
        pid = node.holder()
        assert (node.data_dir / SOCKET).stat().st_mode & 0o777 == 0o600
        assert os.getsid(pid) == pid != os.getsid(agent.pid)


async def test_an_agent_that_ends_in_order_takes_an_idle_holder_along(node: Node) -> None:
    async with node.agent():
        assert node.holder()

    await until(lambda: not holders_of(node.data_dir / SOCKET), what="the holder ends", timeout_s=5.0)


async def test_a_deleted_instance_leaves_no_log(node: Node) -> None:
    async with node.agent(), node.stub() as stub:
        instance_id = await node.create()
        guest = node.printing(instance_id)
        await node.logged(instance_id, await guest.print(10))
        directory = node.data_dir / "consoles" / instance_id
        assert directory.is_dir()

        ref = agent_pb2.InstanceRef(id=instance_id, generation=1, epoch=1)
        await stub.DeleteInstance(agent_pb2.DeleteInstanceRequest(ref=ref))

        await until(lambda: not directory.exists(), what="the log is removed")
    guest.close()


async def test_a_holder_that_hangs_is_replaced(node: Node) -> None:
    async with node.agent() as first:
        instance_id = await node.create()
        guest = node.printing(instance_id)
        await guest.print(10)
        await until(lambda: node.on_disk(instance_id) == 10 * 14, what="it is on disk")
        hanging = node.holder()
        os.kill(hanging, signal.SIGSTOP)
        first.kill()
        await first.wait()

    async with node.agent():
        last = await guest.print(10)
        text = await node.logged(instance_id, last)

        assert text == guest.expected()
        assert node.holder() != hanging
    guest.close()
