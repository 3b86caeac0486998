"""A whole cluster in this process: the server as ``app.py`` wires it, whole agents with the fake driver, real gRPC."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from hvtest_agent_waiting import within
from hypervisor.agent.app import run_agent
from hypervisor.agent.config import AgentSettings
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.agent.drivers.guard import DriverDeadlines, GuardedDriver
from hypervisor.agent.drivers.health import OfferedDriver
from hypervisor.agent.drivers.registry import Drivers
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import HypervisorError
from hypervisor.core.grpc_errors import from_rpc_error
from hypervisor.core.ids import new_id
from hypervisor.core.settings import load
from hypervisor.core.states import InstanceType
from hypervisor.server.app import Addresses, run_server
from hypervisor.server.config import ServerSettings
from hypervisor.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    compute_pb2,
    compute_pb2_grpc,
    instance_pb2,
    operation_pb2_grpc,
)

__all__ = ["WholeAgent", "WholeServer", "container", "failure_of", "whole_agent", "whole_server"]


class WholeServer:
    """A running server and stubs that talk to it."""

    def __init__(self, addresses: Addresses, channel: grpc.aio.Channel, stop: asyncio.Event) -> None:
        self.addresses = addresses
        self.channel = channel
        self.stop = stop
        self.compute: compute_pb2_grpc.ComputeServiceAsyncStub = compute_pb2_grpc.ComputeServiceStub(channel)
        self.cluster: cluster_pb2_grpc.ClusterServiceAsyncStub = cluster_pb2_grpc.ClusterServiceStub(channel)
        self.operations: operation_pb2_grpc.OperationServiceAsyncStub = (
            operation_pb2_grpc.OperationServiceStub(channel)
        )


@asynccontextmanager
async def whole_server(
    directory: Path,
    *overrides: str,
    credentials: grpc.ChannelCredentials | None = None,
    options: Sequence[tuple[str, str]] = (),
) -> AsyncIterator[WholeServer]:
    """A server on free ports and a store file in ``directory``; leaving the context ends it as SIGTERM does."""
    settings = load(
        ServerSettings,
        path=None,
        environ={},
        overrides=[
            f"store.path={directory / 'store.db'}",
            "server.grpc_address=127.0.0.1:0",
            "server.http_address=127.0.0.1:0",
            "server.shutdown_grace=2s",
            "heartbeat.interval=300ms",
            "heartbeat.timeout=1s",
            *overrides,
        ],
    ).settings
    stop = asyncio.Event()
    started: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
    running = asyncio.ensure_future(
        run_server(
            settings,
            stop=stop,
            clock=SystemClock(),
            rng=random.Random(1),
            new_id=new_id,
            version="1.2.3",
            started=started.set_result,
        )
    )
    try:
        both: set[asyncio.Future[Any]] = {running, started}
        await asyncio.wait(both, timeout=15, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        addresses = await within(started, what="the server starts")
        if credentials is None:
            channel = grpc.aio.insecure_channel(addresses.grpc, options=list(options))
        else:
            channel = grpc.aio.secure_channel(addresses.grpc, credentials, options=list(options))
        async with channel:
            yield WholeServer(addresses, channel, stop)
    finally:
        stop.set()
        await within(running, what="the server ends", timeout_s=20.0)


@dataclass(frozen=True)
class WholeAgent:
    """A running agent."""

    driver: FakeDriver
    node_id: str


@asynccontextmanager
async def whole_agent(
    server: WholeServer,
    directory: Path,
    *,
    hostname: str = "node-1",
    lacks: Sequence[str] = (),
    taints: Sequence[str] = (),
) -> AsyncIterator[WholeAgent]:
    """An agent that has registered as ``hostname``, with the fake driver for all types."""
    data = directory / hostname
    settings = AgentSettings.model_validate(
        {
            "node": {"hostname": hostname, "labels": {"disk": "ssd"}, "taints": taints},
            "agent": {
                "port": 0,
                "server_address": [server.addresses.grpc],
                "data_dir": str(data),
                "shutdown_grace": "1s",
            },
            "console": {"holder": "embedded"},
            "drivers": {"health_interval": "100ms"},
            "stats": {"interval": "100ms", "slow_interval": "1s"},
            "metrics": {"address": "127.0.0.1:0"},
        }
    )
    clock, stop = SystemClock(), asyncio.Event()
    fake = FakeDriver(
        FakeConfig(
            state_dir=data / "fake", lacks=tuple((verb, f"the test took {verb} away") for verb in lacks)
        ),
        clock=clock,
    )
    guarded = GuardedDriver(fake, deadlines=DriverDeadlines(action_s=5.0, query_s=5.0))
    running = asyncio.ensure_future(
        run_agent(
            settings,
            stop=stop,
            clock=clock,
            rng=random.Random(1),
            new_id=new_id,
            version="1.2.3",
            drivers=Drivers((OfferedDriver(guarded, tuple(InstanceType)),), ()),
        )
    )

    async def registered() -> str:
        while True:
            try:
                node = await server.cluster.GetNode(cluster_pb2.GetNodeRequest(node=hostname))
            except grpc.aio.AioRpcError as exc:
                if exc.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                if running.done():
                    running.result()
                await asyncio.sleep(0.02)
            else:
                return node.id

    try:
        node_id = await within(registered(), what=f"the agent of {hostname} registers")
        yield WholeAgent(fake, node_id)
    finally:
        stop.set()
        await within(running, what="the agent ends", timeout_s=15.0)


def container(
    name: str, *command: str, request_id: str = "", no_wait: bool = False
) -> compute_pb2.CreateInstanceRequest:
    """A small container."""
    spec = instance_pb2.InstanceSpec(image="busybox", cpu_cores=0.01, memory_mb=16, command=command)
    instance = instance_pb2.Instance(name=name, type=instance_pb2.INSTANCE_TYPE_CONTAINER, spec=spec)
    return compute_pb2.CreateInstanceRequest(request_id=request_id, no_wait=no_wait, instance=instance)


def failure_of(error: grpc.RpcError) -> HypervisorError:
    """The error of the tree behind a failed call."""
    return from_rpc_error(error, peer="the server")  # type: ignore[arg-type]  # an RpcError is a Call too
