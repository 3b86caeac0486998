"""What nodes have and what records want are brought together: a whole server and whole agents, in one process."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from hvtest_agent import MemoryAgents
from hvtest_agent_waiting import within
from hvtest_control_plane import add_node, control_plane, draft, mutation, registration, until
from hvtest_node import assignment
from hvtest_whole_cluster import WholeAgent, WholeServer, container, whole_agent, whole_server
from hypervisor.core.clock import SystemClock
from hypervisor.core.states import InstanceStatus, OperationState
from hypervisor.server import keys
from hypervisor.server.agents import CallContext
from hypervisor.server.services import InstanceRef, StopOptions
from hypervisor.server.store.memory import MemoryStorage
from hypervisor.v1 import cluster_pb2, compute_pb2, instance_pb2, operation_pb2

RUNNING = instance_pb2.INSTANCE_STATUS_RUNNING
STOPPED = instance_pb2.INSTANCE_STATUS_STOPPED
FAILED = instance_pb2.INSTANCE_STATUS_FAILED
_STOP = StopOptions(grace_s=0.0)
QUICK = ("reconcile.interval=1s", "reconcile.orphan_grace=2s")


@asynccontextmanager
async def cluster(tmp_path: Path) -> AsyncIterator[tuple[WholeServer, WholeAgent]]:
    async with whole_server(tmp_path, *QUICK) as server, whole_agent(server, tmp_path) as agent:
        yield server, agent


def _context() -> CallContext:
    return CallContext("test", 5.0)


async def create(server: WholeServer, name: str, *, restart: bool) -> instance_pb2.Instance:
    request = container(name)
    if restart:
        policy = request.instance.spec.restart
        policy.condition = instance_pb2.RESTART_CONDITION_ON_FAILURE
        policy.initial_delay.FromMilliseconds(200)
    await server.compute.CreateInstance(request)
    return await get(server, name)


async def get(server: WholeServer, name: str) -> instance_pb2.Instance:
    return await server.compute.GetInstance(compute_pb2.GetInstanceRequest(instance=name))


async def becomes(
    server: WholeServer, name: str, probe: Callable[[instance_pb2.Instance], bool], *, what: str
) -> instance_pb2.Instance:
    """The instance once ``probe`` holds of it."""

    found = await get(server, name)

    async def look() -> bool:
        nonlocal found
        found = await get(server, name)
        return probe(found)

    await eventually(look, what=what)
    return found


async def eventually(probe: Callable[[], Awaitable[bool]], *, what: str) -> None:
    async def wait() -> None:
        while not await probe():  # noqa: ASYNC110 - what is asked for is in another program
            await asyncio.sleep(0.02)

    await within(wait(), what=what, timeout_s=20.0)


async def status_on(agent: WholeAgent, instance_id: str) -> InstanceStatus:
    return (await agent.driver.get(instance_id)).status


async def test_a_crash_is_told_with_count_and_events(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, agent):
        web = await create(server, "web", restart=True)
        call = server.cluster.WatchEvents(cluster_pb2.WatchEventsRequest())
        await agent.driver.exit(web.id, 3)

        again = await becomes(server, "web", lambda i: i.restarts.total == 1, what="it runs again")

        assert again.status == RUNNING
        assert (again.restarts.count, again.restarts.last_reason, again.restarts.last_exit_code) == (
            1,
            "EXITED",
            3,
        )
        reasons: list[str] = []

        async def follow() -> None:
            async for event in call:
                if event.object_id == web.id:
                    reasons.append(event.reason)
                if event.reason == "RESTARTED":
                    return

        await within(follow(), what="the event of the restart")
        call.cancel()
        assert reasons[-2:] == ["BACKOFF", "RESTARTED"]


async def test_a_node_restarts_by_itself_while_no_server_is_there_and_tells_later(tmp_path: Path) -> None:
    async with whole_server(tmp_path, *QUICK) as first:
        address = first.addresses.grpc
        async with whole_agent(first, tmp_path) as agent:
            web = await create(first, "web", restart=True)
            first.stop.set()
            await asyncio.sleep(0)
            await agent.driver.exit(web.id, 3)

            async def runs() -> bool:
                return await status_on(agent, web.id) is InstanceStatus.RUNNING

            await eventually(runs, what="it runs again without a server")
            async with whole_server(tmp_path, *QUICK, f"server.grpc_address={address}") as second:
                found = await becomes(
                    second, "web", lambda i: i.restarts.total == 1 and i.status == RUNNING, what="told later"
                )
                assert found.epoch == web.epoch


async def test_a_lost_instance_is_made_again_under_a_higher_epoch_as_its_policy_says(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, agent):
        web, db = await create(server, "web", restart=True), await create(server, "db", restart=False)
        for instance in (web, db):
            agent.driver.vanish(instance.id)

        again = await becomes(
            server, "web", lambda i: i.epoch > web.epoch and i.status == RUNNING, what="it is made again"
        )
        gone = await becomes(server, "db", lambda i: i.status == FAILED, what="the other is lost")

        assert again.epoch == web.epoch + 1
        assert gone.status_reason == "RUNTIME_LOST"
        assert {o.instance_id for o in await agent.driver.list()} == {web.id}


async def test_a_node_that_lost_its_disk_gets_what_is_wanted_of_it_again(tmp_path: Path) -> None:
    async with whole_server(tmp_path, *QUICK) as server:
        async with whole_agent(server, tmp_path):
            web, db = await create(server, "web", restart=True), await create(server, "db", restart=False)
        (tmp_path / "node-1" / "journal").unlink()
        shutil.rmtree(tmp_path / "node-1" / "fake")

        async with whole_agent(server, tmp_path) as agent:
            again = await becomes(
                server, "web", lambda i: i.epoch > web.epoch and i.status == RUNNING, what="it is made again"
            )
            gone = await becomes(server, "db", lambda i: i.status_reason == "LOST", what="the other is lost")

            assert again.node_id == web.node_id
            assert gone.status == FAILED
            assert {o.instance_id for o in await agent.driver.list()} == {web.id}
            assert db.id != web.id


async def test_an_agent_without_its_journal_is_told_what_it_runs_and_restarts_it(tmp_path: Path) -> None:
    async with whole_server(tmp_path, *QUICK) as server:
        async with whole_agent(server, tmp_path):
            web = await create(server, "web", restart=True)
        (tmp_path / "node-1" / "journal").unlink()

        async with whole_agent(server, tmp_path) as agent:

            async def adopted() -> bool:
                answer = await server.operations.ListOperations(operation_pb2.ListOperationsRequest())
                return any(o.verb == "adopt" and o.done for o in answer.operations)

            await eventually(adopted, what="its agent is told")
            known = await get(server, "web")
            assert (known.epoch, known.status, known.started_at) == (web.epoch, RUNNING, web.started_at)
            await agent.driver.exit(web.id, 3)

            again = await becomes(
                server, "web", lambda i: i.restarts.total == 1 and i.status == RUNNING, what="it runs again"
            )

            assert again.epoch == web.epoch


async def test_what_runs_and_shall_not_is_stopped(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, agent):
        web = await create(server, "web", restart=True)
        await server.compute.StopInstance(compute_pb2.StopInstanceRequest(instance="web"))
        await agent.driver.start(web.id)

        async def stopped() -> bool:
            return await status_on(agent, web.id) is InstanceStatus.STOPPED

        await eventually(stopped, what="it is stopped again")
        await becomes(
            server, "web", lambda i: i.status == STOPPED and not i.operation_id, what="and known to be"
        )


async def test_what_no_record_tells_of_is_kept_for_its_grace_and_then_removed(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (server, agent):
        web = await create(server, "web", restart=False)
        stranger = assignment()
        await agent.driver.create(stranger)
        await agent.driver.start(stranger.instance_id)
        begun = asyncio.get_running_loop().time()

        async def removed() -> bool:
            return stranger.instance_id not in {o.instance_id for o in await agent.driver.list()}

        await eventually(removed, what="the orphan goes")

        assert asyncio.get_running_loop().time() - begun >= 2.0, "not before its grace is over"
        assert (await get(server, "web")).status == RUNNING
        assert {o.instance_id for o in await agent.driver.list()} == {web.id}


@pytest.fixture
async def memory() -> AsyncIterator[MemoryStorage]:
    storage = MemoryStorage(SystemClock())
    yield storage
    await storage.aclose()


async def test_an_old_copy_of_what_was_placed_elsewhere_since_is_removed(memory: MemoryStorage) -> None:
    agents = MemoryAgents()
    async with (
        control_plane(memory, agents) as plane,
        add_node(plane, registration("node-1")) as one,
        add_node(plane, registration("node-2")) as two,
    ):
        await plane.instances.create(draft("web", node=one), mutation())
        web = plane.instances.resolve(InstanceRef("web")).value
        elsewhere = agents.by_node.setdefault(two, agents.agent(plane.nodes.resolve(two).value))
        await elsewhere.create(web, _context(), start=True)

        await plane.committer.commit(
            lambda d: d.put(keys.instance(web.id), structs.replace(web, epoch=web.epoch + 1))
        )
        await until(lambda: not elsewhere.held)

        assert ("delete_copy", web.id) in elsewhere.calls
        # On its own node the copy is of the old placement too: it goes, and nothing is lost without being told.
        await until(lambda: plane.instances.resolve(InstanceRef("web")).value.status_reason == "LOST")


async def test_a_node_that_does_not_answer_holds_up_no_other(memory: MemoryStorage) -> None:
    agents = MemoryAgents()

    async with (
        control_plane(
            memory,
            agents,
            change=lambda s: replace(
                s, reconciler=replace(s.reconciler, nodes=replace(s.reconciler.nodes, timeout_s=3600.0))
            ),
        ) as plane,
        add_node(plane, registration("node-1")) as one,
    ):
        agents.agent(plane.nodes.resolve(one).value).gates["list"] = asyncio.Event()
        await until(lambda: agents.by_node[one].looks > 0)
        async with add_node(plane, registration("node-2")) as two:
            await until(lambda: two in agents.by_node and agents.by_node[two].looks > 0)


async def test_a_stop_that_the_reconciler_begins_is_an_operation_of_its_own(memory: MemoryStorage) -> None:
    agents = MemoryAgents()
    async with control_plane(memory, agents) as plane, add_node(plane, registration()) as node:
        await plane.instances.create(draft("web"), mutation())
        web = plane.instances.resolve(InstanceRef("web")).value
        await plane.instances.stop(InstanceRef("web"), mutation(), options=_STOP)
        await agents.by_node[node].start(web, _context())

        await until(lambda: agents.by_node[node].held[web.id].status is InstanceStatus.STOPPED)

        await until(
            lambda: any(
                o.value.principal == "system:reconcile" and o.value.state is OperationState.SUCCEEDED
                for o in plane.view.operations()
            )
        )
