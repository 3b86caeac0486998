"""Fixtures of the agent's integration tests: a control plane double and whole agents against it."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from hvtest_agent_waiting import until, within
from hvtest_cluster_double import ClusterDouble, KnownNode
from hvtest_etcd import free_port
from hypervisor.agent.app import run_agent
from hypervisor.agent.config import AgentSettings
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.agent.drivers.guard import DriverDeadlines, GuardedDriver
from hypervisor.agent.drivers.health import OfferedDriver
from hypervisor.agent.drivers.registry import Drivers
from hypervisor.agent.v1 import agent_pb2_grpc
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id
from hypervisor.core.states import InstanceType

__all__ = ["RunningAgent"]


class RunningAgent:
    """A whole agent in this process."""

    def __init__(
        self,
        *,
        driver: FakeDriver,
        known: KnownNode,
        stub: "agent_pb2_grpc.AgentServiceAsyncStub",
        metrics_address: str,
        end: Callable[[], Awaitable[None]],
    ) -> None:
        self.driver = driver
        self.node_id = known.node.id
        self.address = f"127.0.0.1:{known.node.port}"
        self.stub = stub
        self.metrics_address = metrics_address
        self.end = end
        """End it as SIGTERM does, and wait."""


StartAgent = Callable[..., AbstractAsyncContextManager[RunningAgent]]


@pytest.fixture
async def server() -> AsyncIterator[ClusterDouble]:
    async with ClusterDouble() as double:
        yield double


@pytest.fixture
def start_agent(tmp_path: Path, server: ClusterDouble) -> StartAgent:
    """Starts an agent and waits until it is registered; leaving the context ends it as SIGTERM does."""

    @asynccontextmanager
    async def start(
        *,
        data_dir: Path | None = None,
        servers: tuple[str, ...] = (),
        driver: FakeDriver | None = None,
        registered_at: ClusterDouble = server,
        max_series: int = 1000,
        holder: str = "embedded",
    ) -> AsyncIterator[RunningAgent]:
        directory = data_dir or tmp_path / "agent"
        metrics_address = f"127.0.0.1:{free_port()}"
        settings = AgentSettings.model_validate(
            {
                "node": {"hostname": "node-1", "zone": "zone-a", "labels": {"disk": "ssd"}},
                "agent": {
                    "port": 0,
                    "server_address": list(servers or (server.address,)),
                    "data_dir": str(directory),
                    "shutdown_grace": "2s",
                    "console_scrollback": "64KiB",
                },
                "console": {"holder": holder},
                "drivers": {"health_interval": "100ms"},
                "stats": {"interval": "100ms", "slow_interval": "1s"},
                "metrics": {"address": metrics_address, "max_instances": max_series},
            }
        )
        clock, stop = SystemClock(), asyncio.Event()
        fake = driver or FakeDriver(FakeConfig(state_dir=directory / "fake"), clock=clock)
        guarded = GuardedDriver(fake, deadlines=DriverDeadlines(action_s=5.0, query_s=5.0))
        before = len(registered_at.registrations)
        running = asyncio.ensure_future(
            run_agent(
                settings,
                stop=stop,
                clock=clock,
                rng=random.Random(1),
                new_id=new_id,
                version="1.2.3",
                drivers=Drivers((OfferedDriver(guarded, (InstanceType.CONTAINER,)),), ()),
            )
        )

        async def end() -> None:
            stop.set()
            await within(asyncio.shield(running), what="the agent ends", timeout_s=15.0)

        try:
            await until(
                lambda: running.done() or len(registered_at.registrations) > before,
                what="the agent registers",
            )
            if running.done():
                running.result()
            known = registered_at.nodes[registered_at.registrations[-1].node.id]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{known.node.port}") as channel:
                yield RunningAgent(
                    driver=fake,
                    known=known,
                    stub=agent_pb2_grpc.AgentServiceStub(channel),
                    metrics_address=metrics_address,
                    end=end,
                )
        finally:
            await end()

    return start
