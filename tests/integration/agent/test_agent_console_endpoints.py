"""Consoles of every kind of descriptor in the hands of the console holder, while agents are killed and come back: a
terminal that somebody else has made, a socket that serves one client, pipes of a process that an agent started."""

import asyncio
import fcntl
import os
import signal
import socket
import struct
import termios
import tty
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio
import pytest

from hvtest_agent_waiting import until, within
from hvtest_cluster_double import ClusterDouble
from hvtest_node_process import NodeProcess
from hypervisor.core.grpc_errors import from_rpc_error
from hypervisor.v1 import instance_pb2

Input, Output = instance_pb2.ConsoleInput, instance_pb2.ConsoleOutput
KINDS = ["fifos", "pty", "socket", "pipes"]


class Guest(Protocol):
    """The guest's end of a console."""

    def print(self, data: bytes) -> None:
        """Print all of it; waits while nobody reads."""
        ...

    def read(self, count: int) -> bytes:
        """So much of what was typed."""
        ...

    def close(self) -> None:
        """It has ended."""
        ...


class Descriptors:
    """A guest that prints to one descriptor and reads another."""

    def __init__(self, printed: int, typed: int) -> None:
        self.printed, self.typed = printed, typed

    def print(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.printed, view) :]

    def read(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            got += os.read(self.typed, count - len(got))
        return got

    def close(self) -> None:
        for fd in {self.printed, self.typed}:
            os.close(fd)


class Listening:
    """A VMM's end of a console on a socket: it takes one client after the other, as QEMU does."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(20.0)
        self._client: socket.socket | None = None

    def accept(self) -> None:
        """The next client, in place of the one before."""
        if self._client is not None:
            self._client.close()
        self._client, _ = self._listener.accept()

    @property
    def client(self) -> socket.socket:
        if self._client is None:
            self.accept()
        assert self._client is not None
        return self._client

    def print(self, data: bytes) -> None:
        self.client.sendall(data)

    def read(self, count: int) -> bytes:
        got = b""
        while len(got) < count and (more := self.client.recv(count - len(got))):
            got += more
        return got

    def close(self) -> None:
        self._listener.close()
        if self._client is not None:
            self._client.close()


def _lines(first: int, count: int) -> bytes:
    return b"".join(b"line %08d\n" % number for number in range(first, first + count))


async def _begin(node: NodeProcess, kind: str) -> tuple[str, Any]:
    """An instance with such a console, and its guest."""
    instance_id = await node.create(labels={"console": kind})
    directory = node.guests / instance_id
    match kind:
        case "pty":
            master, slave = os.openpty()
            tty.setraw(master)
            (directory / "pty").symlink_to(os.ttyname(slave))
            guest: Any = Descriptors(master, master)
            # Somebody has it open at all times: a terminal without anybody says so to its master.
            node.at_end.callback(os.close, slave)
        case "socket":
            # Its path is longer than an address of a socket may be.
            guest = await asyncio.to_thread(_listen, directory)
        case _:
            out, typed = (os.open(directory / name, os.O_RDWR) for name in ("out", "in"))
            guest = Descriptors(out, typed)
    node.at_end.callback(guest.close)
    return instance_id, guest


def _listen(directory: Path) -> Listening:
    short = Path(f"/proc/self/fd/{os.open(directory, os.O_PATH)}")
    return Listening(short / "socket")


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[NodeProcess]:
    async with ClusterDouble() as server, NodeProcess(tmp_path, server) as made:
        yield made


@asynccontextmanager
async def _viewer(node: NodeProcess, instance_id: str, **more: Any) -> AsyncIterator[Any]:
    async with node.stub() as stub:
        call: Any = stub.AttachConsole()
        await call.write(Input(open=Input.Open(instance=instance_id, **more)))
        first = await within(call.read(), what="the console opens")
        assert first.WhichOneof("output") == "opened", first
        yield call
        call.cancel()


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_lost_either_way_while_the_agent_is_killed(node: NodeProcess, kind: str) -> None:
    async with node.agent() as first:
        instance_id, guest = await _begin(node, kind)
        await within(asyncio.to_thread(guest.print, _lines(0, 1000)), what="the guest prints")
        await node.logged(instance_id, b"line 00000999\n")
        async with _viewer(node, instance_id) as call:
            await call.write(Input(data=b"before"))
            assert await within(asyncio.to_thread(guest.read, 6), what="what is typed arrives") == b"before"
        first.kill()
        await first.wait()
        # More than a pipe or a terminal holds, and less than the scrollback, which a log may lag behind.
        await within(asyncio.to_thread(guest.print, _lines(1000, 15_000)), what="the guest prints on")

    async with node.agent():
        await within(asyncio.to_thread(guest.print, _lines(16_000, 10)), what="the guest prints")
        text = await node.logged(instance_id, b"line 00016009\n")
        async with _viewer(node, instance_id) as call:
            await call.write(Input(data=b"after"))
            assert await within(asyncio.to_thread(guest.read, 5), what="what is typed arrives") == b"after"

    assert text == _lines(0, 16_010)


@pytest.mark.parametrize("kind", ["pty", "pipes"])
async def test_the_same_agent_hands_its_console_to_another_holder(node: NodeProcess, kind: str) -> None:
    async with node.agent():
        instance_id, guest = await _begin(node, kind)
        await within(asyncio.to_thread(guest.print, _lines(0, 10)), what="the guest prints")
        await node.logged(instance_id, b"line 00000009\n")
        killed = node.holder()
        os.kill(killed, signal.SIGKILL)
        await until(lambda: node.holders() not in ([], [killed]), what="another holder is there")
        await within(asyncio.to_thread(guest.print, _lines(10, 10)), what="the guest prints on")

        await node.logged(instance_id, b"line 00000019\n")


async def test_pipes_that_nobody_has_any_more_are_told_as_gone(node: NodeProcess) -> None:
    async with node.agent() as first:
        instance_id, _ = await _begin(node, "pipes")
        await node.logged(instance_id, b"")
        first.kill()
        await first.wait()
    os.kill(node.holder(), signal.SIGKILL)

    async with node.agent(), node.stub() as stub:
        call: Any = stub.AttachConsole()
        await call.write(Input(open=Input.Open(instance=instance_id)))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await within(call.read(), what="the console is refused")

    assert from_rpc_error(refused.value, peer="agent").reason == "CONSOLE_GONE"


async def test_a_socket_that_ends_is_connected_again(node: NodeProcess) -> None:
    async with node.agent():
        instance_id, guest = await _begin(node, "socket")
        guest.print(b"one ")
        await node.logged(instance_id, b"one ")
        async with _viewer(node, instance_id) as call:
            await within(asyncio.to_thread(guest.accept), what="it connects again", timeout_s=20.0)
            guest.print(b"two")

            message = await within(call.read(), what="the viewer stays", timeout_s=20.0)
            assert message.data == b"two"
            await call.write(Input(data=b"typed"))
            assert await within(asyncio.to_thread(guest.read, 5), what="what is typed arrives") == b"typed"

        assert await node.logged(instance_id, b"two") == b"one two"


async def test_a_terminals_size_is_set_by_whichever_agent(node: NodeProcess) -> None:
    def size() -> tuple[int, ...]:
        return struct.unpack("HHHH", fcntl.ioctl(guest.printed, termios.TIOCGWINSZ, bytes(8)))[:2]

    async with node.agent() as first:
        instance_id, guest = await _begin(node, "pty")
        async with _viewer(node, instance_id, size=Input.Resize(width=100, height=40)):
            await until(lambda: size() == (40, 100), what="the size is set")
        first.kill()
        await first.wait()

    async with node.agent(), _viewer(node, instance_id, size=Input.Resize(width=90, height=30)) as call:
        await until(lambda: size() == (30, 90), what="the next agent sets it too")
        await call.write(Input(resize=Input.Resize(width=91, height=31)))
        await until(lambda: size() == (31, 91), what="it is resized")
