"""Claim: listing 10,000 instances by pages takes at most 3 times what a bare grpc.aio server takes for the same bytes.

Reference: a grpc.aio server under uvloop that sends ready-made bytes as long as our pages. Ours: hypervisor-server on a
store with 10,000 instances; filter, order, paging and encoding included. The instances of every listing are compared.
"""

import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop
from get_instance import ECHO, free_port, serving
from measure import claim, interleave, publish

from hvtest_seed import seed_instances, seeded_instance
from hypervisor.v1 import compute_pb2, compute_pb2_grpc

COUNT = 10_000
PAGE = 1000
PAIRS = 7


async def pages_server(port: int) -> None:
    """The reference: answers a request of N as decimal text with N bytes."""

    async def answer(request: bytes, _: object) -> bytes:
        return bytes(int(request))

    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    handler: Any = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Echo": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


class Lists:
    """Lists everything, and remembers how long the pages were."""

    def __init__(self, runner: asyncio.Runner, ours: str, reference: str) -> None:
        self._runner = runner
        self.sizes: list[int] = []
        self._expected = [seeded_instance(number).name for number in range(COUNT)]
        runner.run(self._connect(ours, reference))

    async def _connect(self, ours: str, reference: str) -> None:
        unlimited = [("grpc.max_receive_message_length", -1)]
        self._channels = [grpc.aio.insecure_channel(a, options=unlimited) for a in (ours, reference)]
        self._list: Any = self._channels[0].unary_unary("/hypervisor.v1.ComputeService/ListInstances")
        self._echo: Any = self._channels[1].unary_unary(ECHO)
        stub: Any = compute_pb2_grpc.ComputeServiceStub(self._channels[0])
        await stub.ListInstances(compute_pb2.ListInstancesRequest(), timeout=60, wait_for_ready=True)
        await self._echo(b"1", timeout=60, wait_for_ready=True)

    def ours(self) -> float:
        """Seconds for all pages."""
        return self._runner.run(self._ours())

    async def _ours(self) -> float:
        names: list[str] = []
        sizes: list[int] = []
        token = ""
        took = 0.0
        while True:
            request = compute_pb2.ListInstancesRequest(page_size=PAGE, page_token=token).SerializeToString()
            begin = time.perf_counter()
            data = await self._list(request)
            took += time.perf_counter() - begin
            page = compute_pb2.ListInstancesResponse.FromString(data)
            names += [instance.name for instance in page.instances]
            sizes.append(len(data))
            token = page.next_page_token
            if not token:
                break
        assert names == self._expected, "the list is wrong"
        self.sizes = sizes
        return took

    def reference(self) -> float:
        """Seconds for as many bytes in as many answers."""
        return self._runner.run(self._reference())

    async def _reference(self) -> float:
        took = 0.0
        for size in self.sizes:
            begin = time.perf_counter()
            data = await self._echo(b"%d" % size)
            took += time.perf_counter() - begin
            assert len(data) == size
        return took

    def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            self._runner.run(channel.close())


def main() -> None:
    """Measure and publish."""
    with (
        tempfile.TemporaryDirectory(prefix="hypervisor-bench-") as scratch,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        contextlib.ExitStack() as stack,
    ):
        store = Path(scratch) / "store.db"
        runner.run(seed_instances(store, COUNT))
        ours_port, reference_port = free_port(), free_port()
        flags = [
            f"store.path={store}",
            f"server.grpc_address=127.0.0.1:{ours_port}",
            "server.http_address=127.0.0.1:0",
        ]
        stack.enter_context(serving("-m", "hypervisor.server", *(w for f in flags for w in ("--set", f))))
        stack.enter_context(serving(__file__, "pages", str(reference_port)))
        lists = Lists(runner, f"127.0.0.1:{ours_port}", f"127.0.0.1:{reference_port}")
        mine, theirs = interleave(lists.ours, lists.reference, pairs=PAIRS)
        total = sum(lists.sizes)
        lists.close()
    publish(
        [
            claim(
                f"ListInstances of {COUNT} instances in pages of {PAGE}",
                mine,
                theirs,
                unit="s",
                reference_name=f"bare grpc.aio sending the same {total} bytes",
                better="less",
                goal=3.0,
            )
        ]
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["pages"]:
        uvloop.run(pages_server(int(sys.argv[2])))
    else:
        main()
