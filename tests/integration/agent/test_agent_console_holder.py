"""The console holder as a process: agents die and come back, and so does it; what a guest prints is all there."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hvtest_agent_waiting import until, within
from hvtest_cluster_double import ClusterDouble
from hvtest_node_process import NodeProcess
from hypervisor.agent.console_holder.launching import SOCKET, holders_of
from hypervisor.agent.v1 import agent_pb2
from hypervisor.v1 import instance_pb2

Input, Output = instance_pb2.ConsoleInput, instance_pb2.ConsoleOutput


class Guest:
    """Prints numbered lines into a FIFO, as a guest whose terminal that is."""

    def __init__(self, fifo: Path) -> None:
        # As what stands between a guest and its FIFO opens it: a moment without a reader ends nobody.
        self._fd = os.open(fifo, os.O_RDWR)
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
async def node(tmp_path: Path) -> AsyncIterator[NodeProcess]:
    async with ClusterDouble() as server, NodeProcess(tmp_path, server) as made:
        yield made


async def test_nothing_is_lost_while_the_agent_is_killed_and_away(node: NodeProcess) -> None:
    async with node.agent() as first:
        instance_id = await node.create()
        guest = Guest(node.guests / instance_id / "out")
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


async def test_a_viewer_comes_back_to_the_position_it_left(node: NodeProcess) -> None:
    async with node.agent() as first:
        instance_id = await node.create()
        guest = Guest(node.guests / instance_id / "out")
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


async def test_a_holder_that_is_killed_is_replaced_and_viewers_are_told(node: NodeProcess) -> None:
    async with node.agent(), node.stub() as stub:
        instance_id = await node.create()
        guest = Guest(node.guests / instance_id / "out")
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


async def test_logs_go_through_files_and_restarts_of_everything(node: NodeProcess) -> None:
    limits = {"console__log__max_bytes": "8192", "console__log__files": "3"}
    async with node.agent(**limits, agent__console_scrollback="4096"):
        instance_id = await node.create()
        guest = Guest(node.guests / instance_id / "out")
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


async def test_the_socket_is_for_the_owner_alone_and_the_holder_in_its_own_session(node: NodeProcess) -> None:
    async with node.agent() as agent:
        pid = node.holder()
        assert (node.data_dir / SOCKET).stat().st_mode & 0o777 == 0o600
        assert os.getsid(pid) == pid != os.getsid(agent.pid)


async def test_an_agent_that_ends_in_order_takes_an_idle_holder_along(node: NodeProcess) -> None:
    async with node.agent():
        assert node.holder()

    await until(lambda: not holders_of(node.data_dir / SOCKET), what="the holder ends", timeout_s=5.0)


async def test_a_deleted_instance_leaves_no_log(node: NodeProcess) -> None:
    async with node.agent(), node.stub() as stub:
        instance_id = await node.create()
        guest = Guest(node.guests / instance_id / "out")
        await node.logged(instance_id, await guest.print(10))
        directory = node.data_dir / "consoles" / instance_id
        assert directory.is_dir()

        ref = agent_pb2.InstanceRef(id=instance_id, generation=1, epoch=1)
        await stub.DeleteInstance(agent_pb2.DeleteInstanceRequest(ref=ref))

        await until(lambda: not directory.exists(), what="the log is removed")
    guest.close()


async def test_a_holder_that_hangs_is_replaced(node: NodeProcess) -> None:
    async with node.agent() as first:
        instance_id = await node.create()
        guest = Guest(node.guests / instance_id / "out")
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
