"""Claim: GetInstance through the whole server reaches at least 0.85 of the rate of a bare grpc.aio echo.

Reference: a grpc.aio server under uvloop whose one method sends its request back, with messages as long as our answer.
Ours: hypervisor-server on a store with one instance. Both servers run on one core, this client on another; every
answer is compared.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop
from measure import claim, interleave, publish

from hvtest_seed import seed_instances, seeded_instance
from hypervisor.v1 import compute_pb2, instance_pb2

PAIRS = 9
CALLS = 3000
CONCURRENCY = 32
GET = "/hypervisor.v1.ComputeService/GetInstance"
ECHO = "/echo.Echo/Echo"
CLIENT_CORE, SERVER_CORE = 0, (os.cpu_count() or 1) - 1


async def echo_server(port: int) -> None:
    """The reference: nothing but grpc.aio."""

    async def echo(request: bytes, _: object) -> bytes:
        return request

    server = grpc.aio.server()
    handler: Any = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Echo": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(*command: str) -> Iterator[None]:
    """A server process on its own core."""
    process = subprocess.Popen(
        [sys.executable, *command],
        preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


class Client:
    """Calls one method over and over and compares every answer."""

    def __init__(self, runner: asyncio.Runner, address: str, method: str, request: bytes) -> None:
        self._runner = runner
        self._request = request
        self._method = method
        self._address = address
        self.expected = runner.run(self._first())

    async def _first(self) -> bytes:
        self._channel = grpc.aio.insecure_channel(self._address)
        self._call: Any = self._channel.unary_unary(self._method)
        return bytes(await self._call(self._request, timeout=30, wait_for_ready=True))

    def rate(self) -> float:
        """Calls per second."""
        return self._runner.run(self._rate())

    async def _rate(self) -> float:
        begin = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(self._some(CALLS // CONCURRENCY))
        return CALLS // CONCURRENCY * CONCURRENCY / (time.perf_counter() - begin)

    async def _some(self, count: int) -> None:
        for _ in range(count):
            answer = await self._call(self._request)
            assert answer == self.expected, "a wrong answer"

    def close(self) -> None:
        """Close the channel."""
        self._runner.run(self._channel.close())


def main() -> None:
    """Measure and publish."""
    os.sched_setaffinity(0, {CLIENT_CORE})
    wanted = seeded_instance(0)
    with (
        tempfile.TemporaryDirectory(prefix="hypervisor-bench-") as scratch,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        contextlib.ExitStack() as stack,
    ):
        store = Path(scratch) / "store.db"
        runner.run(seed_instances(store, 1))
        ours_port, echo_port = free_port(), free_port()
        flags = [
            f"store.path={store}",
            f"server.grpc_address=127.0.0.1:{ours_port}",
            "server.http_address=127.0.0.1:0",
        ]
        stack.enter_context(serving("-m", "hypervisor.server", *(w for f in flags for w in ("--set", f))))
        stack.enter_context(serving(__file__, "echo", str(echo_port)))
        request = compute_pb2.GetInstanceRequest(instance=wanted.id).SerializeToString()
        ours = Client(runner, f"127.0.0.1:{ours_port}", GET, request)
        shown = instance_pb2.Instance.FromString(ours.expected)
        assert (shown.id, shown.name, shown.spec.image) == (wanted.id, wanted.name, wanted.spec.image), shown
        payload = bytes(len(ours.expected))
        reference = Client(runner, f"127.0.0.1:{echo_port}", ECHO, payload)
        assert reference.expected == payload
        mine, theirs = interleave(ours.rate, reference.rate, pairs=PAIRS)
        ours.close()
        reference.close()
    publish(
        [
            claim(
                "GetInstance through the whole server",
                mine,
                theirs,
                unit="calls/s",
                reference_name=f"bare grpc.aio echo of {len(payload)} bytes",
                better="more",
                goal=0.85,
                note=f"{CONCURRENCY} at once, server and client on a core each",
            )
        ]
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["echo"]:
        uvloop.run(echo_server(int(sys.argv[2])))
    else:
        main()
