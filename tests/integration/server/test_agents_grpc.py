"""The client of agents against real agent services with the fake driver, over real gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from msgspec.structs import replace

from hvtest_control_plane import add_node, control_plane, draft, mutation, registration, until
from hvtest_node import node_under_test
from hypervisor.agent.api.agent_service import AgentService
from hypervisor.agent.api.console_stream import ConsoleStreams
from hypervisor.agent.api.server import AgentServer
from hypervisor.agent.resources import FixedResources
from hypervisor.core.clock import SystemClock
from hypervisor.core.consoles import ALL_KEPT, ConsoleOptions
from hypervisor.core.errors import FailedPrecondition, HypervisorError, NotFound, Unavailable
from hypervisor.core.ids import new_id
from hypervisor.core.model import ConsoleSize, Node
from hypervisor.core.resources import Resources
from hypervisor.core.states import InstanceStatus
from hypervisor.server.agents import CallContext, ConsoleClosed, ConsoleData, ConsoleOpened
from hypervisor.server.agents_grpc import AgentPool, GrpcAgent
from hypervisor.server.control_plane import ControlPlane
from hypervisor.server.services import Caller, InstanceRef, StopOptions
from hypervisor.server.store.storage import Storage

CALLER = Caller("alice", "request-1")


@asynccontextmanager
async def real_agent(directory: Path) -> AsyncIterator[int]:
    """An agent's service over the fake driver; yields its port."""
    async with node_under_test(directory) as node:
        server = AgentServer(bind="127.0.0.1", port=0, credentials=None, new_id=new_id, grace_s=0.2)
        server.offer(
            AgentService(
                manager=node.manager,
                drivers=node.health,
                resources=FixedResources(Resources(cpu_millis=4000)),
                consoles=ConsoleStreams(node.consoles),
                stats=node.stats,
            )
        )
        async with server:
            yield server.port


@asynccontextmanager
async def cluster(storage: Storage, directory: Path) -> AsyncIterator[ControlPlane]:
    async with (
        real_agent(directory) as port,
        AgentPool() as pool,
        control_plane(storage, pool) as plane,
        add_node(plane, registration(port=port)),
    ):
        yield plane


async def test_an_instance_lives_through_a_real_agent(storage: Storage, tmp_path: Path) -> None:
    async with cluster(storage, tmp_path / "agent") as plane:
        instances, ref = plane.instances, InstanceRef("web")

        await instances.create(draft("web"), mutation())
        statuses = [instances.resolve(ref).value.status]
        await instances.stop(ref, mutation(), options=StopOptions(0.5))
        statuses.append(instances.resolve(ref).value.status)
        await instances.start(ref, mutation())
        await instances.restart(ref, mutation(), options=StopOptions(0.0))
        statuses.append(instances.resolve(ref).value.status)
        made = instances.resolve(ref).value
        node = plane.nodes.resolve(made.node_id).value
        listed = await plane.executor.agents.agent(node).list(CallContext("x", 5.0))
        await instances.delete(ref, mutation(), options=StopOptions(0.0), force=True)
        left = await plane.executor.agents.agent(node).list(CallContext("x", 5.0))

        assert statuses == [InstanceStatus.RUNNING, InstanceStatus.STOPPED, InstanceStatus.RUNNING]
        assert [o.instance_id for o in listed] == [made.id]
        assert left == ()


async def test_refusals_of_the_agent_arrive_as_they_were_raised(storage: Storage, tmp_path: Path) -> None:
    async with cluster(storage, tmp_path / "agent") as plane:
        wanted = draft("web")
        missing = type(wanted)(
            name="web",
            project="default",
            type=wanted.type,
            spec=type(wanted.spec)(image="missing", memory_mb=64),
            labels={},
        )
        with pytest.raises(NotFound) as refused:
            await plane.instances.create(missing, mutation())

        assert refused.value.reason == "IMAGE_NOT_FOUND"
        assert list(plane.view.instances()) == []


async def test_stats_once_and_as_a_stream(storage: Storage, tmp_path: Path) -> None:
    async with cluster(storage, tmp_path / "agent") as plane:
        ref = InstanceRef("web")
        await plane.instances.create(draft("web"), mutation())

        once = await plane.instances.stats(ref, CALLER)
        samples = plane.instances.watch_stats(ref, CALLER, interval_s=0.1, history_s=0.0)
        async with asyncio.timeout(10):
            seen = [(await anext(samples)).sampled_at for _ in range(3)]
            await plane.instances.stop(ref, mutation(), options=StopOptions(0.0))
            rest = [sample async for sample in samples]

        assert once.memory_used_bytes is not None
        assert seen == sorted(set(seen))
        assert len(rest) < 5, "the stream ends with the instance"
        with pytest.raises(FailedPrecondition) as stopped:
            await plane.instances.stats(ref, CALLER)
        assert stopped.value.reason == "NOT_RUNNING"


async def test_a_console_carries_bytes_both_ways_and_ends_with_the_instance(
    storage: Storage, tmp_path: Path
) -> None:
    async with cluster(storage, tmp_path / "agent") as plane:
        ref = InstanceRef("web")
        await plane.instances.create(draft("web"), mutation())
        session = await plane.instances.attach_console(
            ref, CALLER, ConsoleOptions(replay=ALL_KEPT, size=ConsoleSize(80, 24))
        )
        seen: list[object] = []

        async def read() -> None:
            async for event in session.output():
                seen.append(event)  # noqa: PERF401 (looked at while it grows)

        def text() -> bytes:
            return b"".join(e.data for e in seen if isinstance(e, ConsoleData))

        reading = asyncio.create_task(read())
        await session.send(b"marco\n")
        await until(lambda: b"marco" in text())
        await session.resize(ConsoleSize(120, 40))
        await plane.instances.stop(ref, mutation(), options=StopOptions(0.0))
        await asyncio.wait_for(reading, 10)
        await session.aclose()
        await session.aclose()

        assert isinstance(seen[0], ConsoleOpened)
        assert isinstance(seen[-1], ConsoleClosed)
        assert seen[-1].reason == "EXITED"


async def test_a_console_of_what_is_not_there_is_refused(storage: Storage, tmp_path: Path) -> None:
    async with (
        real_agent(tmp_path / "agent") as port,
        AgentPool() as pool,
        control_plane(storage, pool) as plane,
        add_node(plane, registration(port=port)) as node_id,
    ):
        agent = pool.agent(plane.nodes.resolve(node_id).value)
        with pytest.raises(HypervisorError) as refused:
            await agent.attach_console(new_id("i"), CallContext("x", 5.0), ConsoleOptions(read_only=True))
        assert refused.value.reason == "INSTANCE_NOT_FOUND"


async def test_nobody_there_is_node_unreachable(storage: Storage) -> None:
    async with AgentPool() as pool, control_plane(storage, pool) as plane:
        node, _ = await plane.nodes.register(registration(port=1))
        agent = pool.agent(node.value)

        with pytest.raises(Unavailable) as refused:
            await agent.list(CallContext("x", 2.0))

        assert refused.value.reason == "NODE_UNREACHABLE"
        assert refused.value.metadata["node"] == "node-1"


@asynccontextmanager
async def silent_agent() -> AsyncIterator[tuple[int, asyncio.Event]]:
    """Something that takes calls and never answers; yields its port, and what is set at the first call."""
    called = asyncio.Event()

    async def serve(_: object, __: "grpc.aio.ServicerContext[object, object]") -> None:
        called.set()
        await asyncio.Event().wait()

    class Anything(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[object, object]":
            return grpc.stream_stream_rpc_method_handler(serve)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Anything(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port, called
    finally:
        await server.stop(None)


@pytest.mark.parametrize("kind", ["call", "stats", "console"])
async def test_a_node_that_moves_ends_what_waits_for_it_as_unreachable(kind: str) -> None:
    async def one(agent: GrpcAgent) -> None:
        context = CallContext("x", 20.0)
        match kind:
            case "call":
                await agent.list(context)
            case "stats":
                async for _ in agent.watch_stats(new_id("i"), context, interval_s=1.0, history_s=0.0):
                    pass
            case _:
                await agent.attach_console(new_id("i"), context, ConsoleOptions(read_only=True))

    async with silent_agent() as (port, called), AgentPool() as pool:
        now = SystemClock().now()
        node = Node(
            id=new_id("n"), hostname="moving", address="127.0.0.1", port=port, created_at=now, updated_at=now
        )
        waiting = asyncio.create_task(one(pool.agent(node)))
        async with asyncio.timeout(10):
            await called.wait()
            pool.agent(replace(node, port=1))

            with pytest.raises(Unavailable) as ended:
                await waiting

        assert ended.value.reason == "NODE_UNREACHABLE"


async def test_calls_in_progress_end_as_unreachable_when_the_pool_closes(
    storage: Storage, tmp_path: Path
) -> None:
    async with real_agent(tmp_path / "agent") as port, control_plane(storage, AgentPool()) as plane:
        node, _ = await plane.nodes.register(registration(port=port))
        pool = AgentPool()
        agent = pool.agent(node.value)
        assert await agent.list(CallContext("x", 5.0)) == ()
        assert pool.agent(node.value) is agent

        pool.forget_all_but([])
        await pool.aclose()

        with pytest.raises(Unavailable) as refused:
            await agent.list(CallContext("x", 5.0))
        assert refused.value.reason == "NODE_UNREACHABLE"
