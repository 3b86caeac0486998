"""A console over gRPC: the echo of a keystroke, and the rate of bulk output, through server, agent and console holder.

Ours: hypervisor-server, an agent (whose guest is a process of this benchmark on two FIFOs) and its console holder, all
real processes. Reference of the bulk output: the same guest process on FIFOs of its own, ``cat`` in the holder's place
(from the FIFO to a socket), a grpc.aio server that reads that in pieces of up to 64 KiB and streams them as they are,
and a second one that relays that stream. So there are the same hops, but no scrollback, log on disk, window, protocol
or access control. Every byte is compared.
"""

import asyncio
import contextlib
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio
import uvloop
from measure import claim, interleave, publish

from hvtest_endpoint_driver import NAME
from hypervisor.agent.console_holder.launching import SOCKET, holders_of
from hypervisor.v1 import compute_pb2, compute_pb2_grpc, instance_pb2

PAIRS = 7
KEYSTROKES = 400
ECHO_GOAL_MS = 5.0
BULK_BYTES = 32 << 20
PIECE = 64 << 10
METHOD = "/bare.Bare/Stream"
BLOCK = random.Random(1).randbytes(1 << 20)
"""What the guest prints in bulk, over and over."""


def guest(directory: Path) -> None:
    """The guest: echoes what is typed; ``!`` has it print BULK_BYTES."""
    typed = os.open(directory / "in", os.O_RDWR)
    printed = os.open(directory / "out", os.O_RDWR)
    while True:
        data = os.read(typed, PIECE)
        if data != b"!":
            os.write(printed, data)
            continue
        for _ in range(BULK_BYTES // len(BLOCK)):
            view = memoryview(BLOCK)
            while view:
                view = view[os.write(printed, view[:PIECE]) :]


async def bare_source(port: int, directory: Path) -> None:
    """The reference's agent: FIFOs to a stream."""
    typed = os.open(directory / "in", os.O_RDWR | os.O_NONBLOCK)
    ours, theirs = socket.socketpair()
    with (directory / "out").open("rb", buffering=0) as out:
        holder = await asyncio.create_subprocess_exec("cat", stdin=out, stdout=theirs)
    theirs.close()
    reader, _ = await asyncio.open_unix_connection(sock=ours, limit=PIECE)

    async def stream(requests: AsyncIterator[bytes], context: Any) -> None:
        async def typing() -> None:
            async for data in requests:
                os.write(typed, data)

        task = asyncio.ensure_future(typing())
        try:
            while data := await reader.read(PIECE):
                await context.write(data)
        finally:
            task.cancel()

    try:
        await _serve(port, stream)
    finally:
        with contextlib.suppress(ProcessLookupError):
            holder.kill()


async def bare_relay(port: int, source: int) -> None:
    """The reference's server: a stream to a stream."""
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{source}")
    call: Any = channel.stream_stream(METHOD)

    async def stream(requests: AsyncIterator[bytes], context: Any) -> None:
        onward = call(wait_for_ready=True)

        async def typing() -> None:
            async for data in requests:
                await onward.write(data)

        task = asyncio.ensure_future(typing())
        try:
            while (data := await onward.read()) is not grpc.aio.EOF:
                await context.write(data)
        finally:
            task.cancel()
            onward.cancel()

    await _serve(port, stream)


async def _serve(port: int, stream: Any) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server()
    handler: Any = grpc.stream_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", {"Stream": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await stop.wait()
    await server.stop(None)


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(*command: str) -> Iterator[None]:
    """A process of this interpreter, ended with the context."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Terminal(Protocol):
    """What a viewer has open."""

    async def write(self, data: bytes) -> None:
        """Type."""
        ...

    async def read(self) -> bytes:
        """The next output."""
        ...


class Ours:
    """A console of the server."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def write(self, data: bytes) -> None:
        """Type."""
        await self._call.write(instance_pb2.ConsoleInput(data=data))

    async def read(self) -> bytes:
        """The next output; nothing but data may come."""
        message = await self._call.read()
        assert message is not grpc.aio.EOF, "the console has ended"
        assert message.WhichOneof("output") == "data", message
        return bytes(message.data)


class Bare:
    """A stream of the reference."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def write(self, data: bytes) -> None:
        """Type."""
        await self._call.write(data)

    async def read(self) -> bytes:
        """The next output."""
        data = await self._call.read()
        assert data is not grpc.aio.EOF
        return bytes(data)


async def echo_p99_ms(terminal: Terminal) -> float:
    """Milliseconds from a key's being typed to its being shown, at the 99th of 100, at the pace of fast typing."""
    took = []
    rng = random.Random(2)
    for _ in range(KEYSTROKES):
        await asyncio.sleep(rng.uniform(0.002, 0.012))
        key = bytes([rng.randrange(97, 123)])
        begin = time.perf_counter()
        await terminal.write(key)
        shown = await terminal.read()
        took.append(time.perf_counter() - begin)
        assert shown == key, "not the key"
    return statistics.quantiles(took, n=100)[98] * 1000


async def bulk_rate(terminal: Terminal) -> float:
    """Bytes a second of bulk output."""
    twice, got, largest = memoryview(BLOCK + BLOCK), 0, 0
    begin = time.perf_counter()
    await terminal.write(b"!")
    while got < BULK_BYTES:
        data = await terminal.read()
        at = got % len(BLOCK)
        assert data == twice[at : at + len(data)], "not what the guest printed"
        got += len(data)
        largest = max(largest, len(data))
    assert got == BULK_BYTES
    assert largest <= PIECE
    return got / (time.perf_counter() - begin)


async def open_ours(address: str) -> Ours:
    """Create an instance and open its console."""
    channel = grpc.aio.insecure_channel(address)
    compute: Any = compute_pb2_grpc.ComputeServiceStub(channel)
    spec = instance_pb2.InstanceSpec(image="busybox", cpu_cores=0.01, memory_mb=16)
    wanted = instance_pb2.Instance(name="web", type=instance_pb2.INSTANCE_TYPE_CONTAINER, spec=spec)
    deadline = time.monotonic() + 60
    while True:
        try:
            await compute.CreateInstance(
                compute_pb2.CreateInstanceRequest(instance=wanted), timeout=30, wait_for_ready=True
            )
            break
        except grpc.aio.AioRpcError:
            # No node has registered yet.
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.3)
    call = compute.AttachConsole()
    await call.write(instance_pb2.ConsoleInput(open=instance_pb2.ConsoleInput.Open(instance="web")))
    first = await call.read()
    assert first.WhichOneof("output") == "opened", first
    return Ours(call)


async def open_bare(address: str) -> Bare:
    """Open the reference's stream."""
    call: Any = grpc.aio.insecure_channel(address).stream_stream(METHOD)
    return Bare(call(wait_for_ready=True))


def _fifos(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("in", "out"):
        if not (directory / name).exists():
            os.mkfifo(directory / name)
    return directory


@contextlib.contextmanager
def _holder_ends(data_dir: Path) -> Iterator[None]:
    """The console holder outlives its agent on purpose; a benchmark ends it."""
    try:
        yield
    finally:
        for pid in holders_of(data_dir / SOCKET):
            os.kill(pid, signal.SIGKILL)


def _flags(keys: dict[str, str]) -> list[str]:
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


def main() -> None:
    """Measure and publish."""
    with (
        tempfile.TemporaryDirectory(prefix="hv-bench-") as scratch,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        contextlib.ExitStack() as stack,
    ):
        root = Path(scratch)
        (root / "guests").mkdir()
        server, source, relay = free_port(), free_port(), free_port()
        data_dir = root / "agent"
        server_keys = {
            "store.path": str(root / "store.db"),
            "server.grpc_address": f"127.0.0.1:{server}",
            "server.http_address": "127.0.0.1:0",
        }
        agent_keys = {
            "agent.data_dir": str(data_dir),
            "agent.server_address": f"127.0.0.1:{server}",
            "agent.bind": "127.0.0.1",
            "agent.port": "0",
            "drivers.enabled": NAME,
            "node.hostname": "bench",
            "metrics.address": "127.0.0.1:0",
            # The guest is not slowed by its viewers; with this none is ever skipped forward.
            "agent.console_scrollback": "64MiB",
        }
        stack.enter_context(running("-m", "hypervisor.server", *_flags(server_keys)))
        stack.enter_context(_holder_ends(data_dir))
        stack.enter_context(running("-m", "hvtest_endpoint_driver", *_flags(agent_keys)))
        ours = runner.run(open_ours(f"127.0.0.1:{server}"))
        (instance,) = (root / "guests").iterdir()
        stack.enter_context(running(__file__, "guest", str(instance)))
        fifos = _fifos(root / "bare")
        stack.enter_context(running(__file__, "guest", str(fifos)))
        stack.enter_context(running(__file__, "source", str(source), str(fifos)))
        stack.enter_context(running(__file__, "relay", str(relay), str(source)))
        bare = runner.run(open_bare(f"127.0.0.1:{relay}"))
        echo, bare_echo = interleave(
            lambda: runner.run(echo_p99_ms(ours)), lambda: runner.run(echo_p99_ms(bare)), pairs=PAIRS
        )
        mine, theirs = interleave(
            lambda: runner.run(bulk_rate(ours)), lambda: runner.run(bulk_rate(bare)), pairs=PAIRS
        )
    publish(
        [
            claim(
                "console: echo of a keystroke through server and agent, p99",
                echo,
                [ECHO_GOAL_MS] * len(echo),
                unit="ms",
                reference_name=f"{ECHO_GOAL_MS:g} ms",
                better="less",
                goal=1.0,
                note=f"{statistics.median(bare_echo):.2g} ms through two bare grpc.aio streams",
            ),
            claim(
                "console: bulk output over gRPC",
                mine,
                theirs,
                unit="bytes/s",
                reference_name="cat and two bare grpc.aio streams of 64 KiB",
                better="more",
                goal=0.9,
                note="ours also keeps a scrollback and a log on disk",
            ),
        ]
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["guest", directory]:
            guest(Path(directory))
        case ["source", port, directory]:
            uvloop.run(bare_source(int(port), Path(directory)))
        case ["relay", port, source_port]:
            uvloop.run(bare_relay(int(port), int(source_port)))
        case _:
            main()
