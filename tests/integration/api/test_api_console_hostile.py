"""Viewers that mean harm, through server, agent and console holder as processes: they cost memory within a bound, and
neither the guest nor anybody else who looks on is held up."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from hvtest_agent_waiting import until, within
from hvtest_endpoint_driver import NAME
from hypervisor.agent.console_holder.launching import SOCKET, holders_of
from hypervisor.v1 import compute_pb2, compute_pb2_grpc, instance_pb2

Input = instance_pb2.ConsoleInput

VIEWERS = 8
BULK_BYTES = 24 << 20
SERVER_BYTES = AGENT_BYTES = 2 << 20
"""Of memory for each hostile viewer: its window of 256 KiB or two messages, and what gRPC keeps of each connection."""
HOLDER_BYTES = 512 << 10
"""Here it takes 96 KiB at most; the rest is what the allocator had not given back."""


class Cluster:
    """A server and an agent as processes, and the guest's end of one console."""

    def __init__(self, address: str, guests: Path, pids: dict[str, int]) -> None:
        self.address = address
        self.pids = pids
        self._guests = guests
        self._made: list[grpc.aio.Channel] = []

    def compute(self) -> Any:
        """Calls over a connection of their own."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        self._made.append(grpc.aio.insecure_channel(self.address, options=options))
        return compute_pb2_grpc.ComputeServiceStub(self._made[-1])

    async def create(self) -> Path:
        """An instance; returns the directory of its FIFOs."""
        spec = instance_pb2.InstanceSpec(image="fake", cpu_cores=0.01, memory_mb=16)
        wanted = instance_pb2.Instance(name="web", type=instance_pb2.INSTANCE_TYPE_CONTAINER, spec=spec)
        request = compute_pb2.CreateInstanceRequest(instance=wanted)

        async def created() -> None:
            while True:
                try:
                    await self.compute().CreateInstance(request, wait_for_ready=True, timeout=20)
                except grpc.aio.AioRpcError as exc:
                    # No node has registered yet.
                    if exc.code() is grpc.StatusCode.INVALID_ARGUMENT:
                        raise
                    await asyncio.sleep(0.1)
                else:
                    return

        await within(created(), what="the instance is created", timeout_s=40.0)
        (directory,) = self._guests.iterdir()
        return directory

    def memory(self) -> dict[str, int]:
        """Bytes each process has in memory."""
        found = {}
        for name, pid in self.pids.items():
            status = Path(f"/proc/{pid}/status").read_text()
            kib = re.search(r"VmRSS:\s+(\d+)", status)
            assert kib is not None, status
            found[name] = int(kib[1]) << 10
        return found

    async def aclose(self) -> None:
        """Close the connections."""
        for channel in self._made:
            await channel.close()


class Viewer:
    """One who behaves."""

    def __init__(self, compute: Any) -> None:
        self.call = compute.AttachConsole()
        self.bytes = 0
        self.skipped = 0
        self.last = b""

    async def open(self, **more: Any) -> None:
        """Begin."""
        await self.call.write(Input(open=Input.Open(instance="web", **more)))
        first = await within(self.call.read(), what="the console opens")
        assert first.WhichOneof("output") == "opened"

    async def until(self, position: int) -> None:
        """Read on until so much has passed."""

        async def read() -> None:
            while self.bytes + self.skipped < position:
                message = await self.call.read()
                assert message is not grpc.aio.EOF
                self.skipped += message.skipped.bytes
                self.bytes += len(message.data)
                self.last = message.data or self.last

        await within(read(), what=f"output up to {position}", timeout_s=60.0)


@contextlib.contextmanager
def _process(log: Path, *command: str) -> Iterator[Callable[[], Awaitable[int]]]:
    started: list[asyncio.subprocess.Process] = []

    async def start() -> int:
        with log.open("ab") as target:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *command, stdout=target, stderr=target
            )
        started.append(process)
        return process.pid

    try:
        yield start
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)


def _flags(keys: dict[str, str]) -> list[str]:
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    guests, data_dir = tmp_path / "guests", tmp_path / "agent"
    guests.mkdir()
    server_keys = {
        "store.path": str(tmp_path / "store.db"),
        "server.grpc_address": address,
        "server.http_address": "127.0.0.1:0",
    }
    agent_keys = {
        "agent.data_dir": str(data_dir),
        "agent.server_address": address,
        "agent.bind": "127.0.0.1",
        "agent.port": "0",
        "drivers.enabled": NAME,
        "node.hostname": "node-1",
        "metrics.address": "127.0.0.1:0",
    }
    with (
        _process(tmp_path / "server.log", "-m", "hypervisor.server", *_flags(server_keys)) as server,
        _process(tmp_path / "agent.log", "-m", "hvtest_endpoint_driver", *_flags(agent_keys)) as agent,
    ):
        pids = {"server": await server(), "agent": await agent()}
        holder = data_dir / SOCKET
        made = Cluster(address, guests, pids)
        try:
            await until(lambda: len(holders_of(holder)) == 1, what="the holder is there", timeout_s=30.0)
            (pids["holder"],) = holders_of(holder)
            yield made
        finally:
            await made.aclose()
            os.kill(pids["agent"], signal.SIGKILL)
            for pid in holders_of(holder):
                os.kill(pid, signal.SIGKILL)


async def _silent(viewer: Viewer) -> None:
    """Takes nothing."""
    await viewer.open()


async def _greedy(viewer: Viewer) -> None:
    """Has the largest window there is, and takes nothing."""
    await viewer.open(window_bytes=1 << 60)


async def _flooding(viewer: Viewer) -> None:
    """Types as much as goes into a guest that reads nothing, and takes nothing."""
    await viewer.open()
    while True:
        await viewer.call.write(Input(data=b"x" * (64 << 10)))


async def _granting(viewer: Viewer) -> None:
    """Grants one byte after the other."""
    await viewer.open(window_bytes=1)
    while True:
        await viewer.call.write(Input(credit=1))


async def _resizing(viewer: Viewer) -> None:
    """Has another size all the time."""
    await viewer.open()
    for width in range(1, 1 << 30):
        await viewer.call.write(Input(resize=Input.Resize(width=width % 10_000 + 1, height=24)))


@pytest.mark.parametrize("behave", [_silent, _greedy, _flooding, _granting, _resizing])
async def test_hostile_viewers_cost_little_and_hold_up_nobody(
    cluster: Cluster, behave: Callable[[Viewer], Awaitable[None]]
) -> None:
    directory = await cluster.create()
    good = Viewer(cluster.compute())
    await good.open()
    printed = os.open(directory / "out", os.O_RDWR)
    written = 0

    def bulk() -> int:
        block = b"y" * (64 << 10)
        return sum(os.write(printed, block) for _ in range(BULK_BYTES // len(block)))

    try:
        # Once without them: what everybody's first bulk costs is not theirs.
        written += await asyncio.to_thread(bulk)
        await good.until(written)
        before = cluster.memory()

        hostile = [asyncio.ensure_future(behave(Viewer(cluster.compute()))) for _ in range(VIEWERS)]
        for _ in range(2):
            written += await within(asyncio.to_thread(bulk), what="the guest prints on", timeout_s=60.0)
            await good.until(written)
        os.write(printed, b"still here")
        await good.until(written + 10)
        after = cluster.memory()
        for task in hostile:
            task.cancel()
        await asyncio.wait(hostile)
    finally:
        os.close(printed)

    assert good.last.endswith(b"still here")
    grown = {name: (after[name] - before[name]) // VIEWERS for name in before}
    print(f"{behave.__name__}: {grown} bytes each; skipped {good.skipped} of {written}")
    assert grown["server"] <= SERVER_BYTES, grown
    assert grown["agent"] <= AGENT_BYTES, grown
    assert grown["holder"] <= HOLDER_BYTES, grown
