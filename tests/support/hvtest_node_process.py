"""One node as processes: the agent with the driver of hvtest_endpoint_driver, and its console holder."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import grpc.aio

from hvtest_agent_waiting import until, within
from hvtest_cluster_double import ClusterDouble
from hvtest_endpoint_driver import NAME
from hypervisor.agent.console_holder.launching import SOCKET, holders_of
from hypervisor.agent.v1 import agent_pb2, agent_pb2_grpc
from hypervisor.core.ids import new_id
from hypervisor.v1 import instance_pb2

__all__ = ["NodeProcess"]


class NodeProcess:
    """A node whose agent can be killed; enter it with ``async with``. Its guests are what hvtest_endpoint_driver
    makes of consoles. ``at_end``: what ends with it."""

    def __init__(self, directory: Path, server: ClusterDouble) -> None:
        self.data_dir = directory / "agent"
        self.guests = directory / "guests"
        self.guests.mkdir()
        self._server = server
        self.log = directory / "agent.log"
        self.at_end = ExitStack()

    async def __aenter__(self) -> "NodeProcess":
        return self

    async def __aexit__(self, *_: object) -> None:
        for pid in self.holders():
            os.kill(pid, signal.SIGKILL)
        self.at_end.close()
        await until(lambda: not self.holders(), what="no holder is left")

    @asynccontextmanager
    async def agent(self, **settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """One run of the agent, registered."""
        before = len(self._server.registrations)
        values = {
            "agent.data_dir": str(self.data_dir),
            "agent.server_address": self._server.address,
            "agent.port": "0",
            "metrics.address": "127.0.0.1:0",
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

    async def create(self, *, labels: Mapping[str, str] | None = None) -> str:
        """An instance that runs; returns its id."""
        instance_id = new_id("i")
        request = agent_pb2.CreateInstanceRequest(
            ref=agent_pb2.InstanceRef(id=instance_id, generation=1, epoch=1),
            name="web",
            project="default",
            type=instance_pb2.INSTANCE_TYPE_CONTAINER,
            spec=instance_pb2.InstanceSpec(image="fake", memory_mb=64),
            labels=labels,
            start=True,
        )
        async with self.stub() as stub:
            await stub.CreateInstance(request)
        return instance_id

    def holder(self) -> int:
        """Number of its console holder's process."""
        (pid,) = self.holders()
        return pid

    def holders(self) -> list[int]:
        """Numbers of all of them."""
        return holders_of(self.data_dir / SOCKET)

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
