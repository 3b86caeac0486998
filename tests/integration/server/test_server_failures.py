"""What survives: servers that die, agents and stores that cannot be reached, several servers on one store."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from hvtest_agent import MemoryAgents
from hvtest_control_plane import (
    add_node,
    allocation_is_sum,
    control_plane,
    draft,
    mutation,
    registration,
    until,
)
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import AlreadyExists, Internal, ResourceExhausted, Unavailable
from hypervisor.core.states import InstanceStatus, NodeStatus, OperationState
from hypervisor.server import keys
from hypervisor.server.control_plane import ControlPlaneSettings
from hypervisor.server.services import InstanceRef, StopOptions
from hypervisor.server.store.memory import MemoryStorage
from hypervisor.server.store.storage import Committed, Compacted, Compare, Conflicted, Operation, Storage

FORCE = StopOptions(grace_s=0.0)


class StoreThatFails(MemoryStorage):
    """A store that can be cut off."""

    down = False
    full = False
    refusals = 0

    async def commit(
        self, compares: Sequence[Compare], operations: Sequence[Operation]
    ) -> Committed | Conflicted:
        self._check()
        if self.full:
            self.refusals += 1
            raise ResourceExhausted("the disk is full", reason="STORE_DISK_FULL", retry_after_s=0.05)
        return await super().commit(compares, operations)

    async def current_revision(self) -> int:
        self._check()
        return await super().current_revision()

    async def keep_alive(self, lease_id: str) -> float:
        self._check()
        return await super().keep_alive(lease_id)

    def _check(self) -> None:
        if self.down:
            raise Unavailable("the store is down", reason="STORE_UNAVAILABLE", retry_after_s=0.05)


def long_leases(settings: ControlPlaneSettings) -> ControlPlaneSettings:
    return replace(settings, server_ttl_s=30.0)


@pytest.fixture
async def memory() -> AsyncIterator[StoreThatFails]:
    storage = StoreThatFails(SystemClock())
    yield storage
    await storage.aclose()


async def test_two_servers_on_one_store_never_overcommit(storage: Storage) -> None:
    agents = MemoryAgents()
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(control_plane(storage, agents, server_id="s-1"))
        two = await stack.enter_async_context(control_plane(storage, agents, server_id="s-2"))
        await stack.enter_async_context(add_node(one, registration(cpu_cores=10)))
        await two.view.wait_revision(one.view.revision)

        results = await asyncio.gather(
            *((one, two)[n % 2].instances.create(draft(f"i{n}"), mutation()) for n in range(40)),
            return_exceptions=True,
        )

        assert len([r for r in results if isinstance(r, ResourceExhausted)]) == 30
        assert [
            r for r in results if isinstance(r, BaseException) and not isinstance(r, ResourceExhausted)
        ] == []
        (held,) = (await allocation_is_sum(storage)).values()
        assert held.instances == 10


async def test_two_servers_cannot_both_give_a_name(storage: Storage) -> None:
    agents = MemoryAgents()
    async with (
        control_plane(storage, agents, server_id="s-1") as one,
        control_plane(storage, agents, server_id="s-2") as two,
        add_node(one, registration()),
    ):
        await two.view.wait_revision(one.view.revision)
        results = await asyncio.gather(
            one.instances.create(draft("web"), mutation()),
            two.instances.create(draft("web"), mutation()),
            return_exceptions=True,
        )

        assert sorted(type(r) is AlreadyExists for r in results) == [False, True]


async def test_a_request_repeated_at_another_server_waits_for_the_first(storage: Storage) -> None:
    agents = MemoryAgents()
    async with (
        control_plane(storage, agents, server_id="s-1") as one,
        control_plane(storage, agents, server_id="s-2") as two,
        add_node(one, registration()) as node_id,
    ):
        gate = agents.agent(one.nodes.resolve(node_id).value).gates["create"] = asyncio.Event()
        first = asyncio.create_task(one.instances.create(draft("web"), mutation("r-1")))
        await until(lambda: two.view.operation_of_request("r-1") is not None)
        second = asyncio.create_task(two.instances.create(draft("web"), mutation("r-1")))
        await asyncio.sleep(0)
        gate.set()

        assert (await first).value.id == (await second).value.id
        assert [verb for verb, _ in agents.by_node[node_id].calls] == ["create"]


async def test_another_server_finishes_what_a_dead_one_began(storage: Storage) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents, server_id="s-2") as survivor:
        async with AsyncExitStack() as stack:
            dying = await stack.enter_async_context(control_plane(storage, agents, server_id="s-1"))
            node_id = await stack.enter_async_context(add_node(survivor, registration()))
            await dying.view.wait_revision(survivor.view.revision)
            gate = agents.agent(survivor.nodes.resolve(node_id).value).gates["create"] = asyncio.Event()
            begun = await dying.instances.create(draft("web"), mutation("r-1", wait=False))
            await until(lambda: bool(agents.by_node[node_id].calls))
        gate.set()

        done = await survivor.operations.wait(begun.value.id, timeout_s=10)

        assert (done.value.state, done.value.server_id) == (OperationState.SUCCEEDED, "s-2")
        assert survivor.instances.resolve(InstanceRef("web")).value.status is InstanceStatus.RUNNING
        assert len(agents.by_node[node_id].holds()) == 1
        await allocation_is_sum(storage)


async def test_a_restarted_server_goes_on_with_its_own_operations(storage: Storage) -> None:
    agents = MemoryAgents()
    joining = registration()
    async with control_plane(storage, agents, change=long_leases) as plane:
        await plane.nodes.register(joining)
        agents.agent(plane.nodes.resolve(joining.id).value).gates["create"] = asyncio.Event()
        await plane.instances.create(draft("web"), mutation("r-1", wait=False))
        await until(lambda: bool(agents.by_node[joining.id].calls))
    agents.by_node[joining.id].gates.clear()

    async with control_plane(storage, agents, change=long_leases) as plane:
        done = await plane.operations.wait("r-1", timeout_s=5)

        assert done.value.state is OperationState.SUCCEEDED


async def test_a_store_that_is_down_refuses_writes_and_reads_go_on(memory: StoreThatFails) -> None:
    async with control_plane(memory, MemoryAgents(), change=long_leases) as plane:
        await plane.nodes.register(registration())
        await plane.instances.create(draft("web"), mutation())
        memory.down = True

        with pytest.raises(Unavailable) as refused:
            await plane.instances.create(draft("other"), mutation())
        await until(lambda: plane.view.stale)

        assert refused.value.reason == "STORE_UNAVAILABLE"
        assert refused.value.retry_after_s
        assert plane.instances.resolve(InstanceRef("web")).value.status is InstanceStatus.RUNNING
        memory.down = False
        await until(lambda: not plane.view.stale)
        await plane.instances.create(draft("other"), mutation())


async def test_a_result_waits_for_the_store_to_come_back(memory: StoreThatFails) -> None:
    agents = MemoryAgents()
    async with control_plane(memory, agents, change=long_leases) as plane:
        joining = registration()
        await plane.nodes.register(joining)
        gate = agents.agent(plane.nodes.resolve(joining.id).value).gates["create"] = asyncio.Event()
        creating = asyncio.create_task(plane.instances.create(draft("web"), mutation()))
        await until(lambda: bool(agents.by_node[joining.id].calls))
        memory.down = True
        gate.set()
        await until(lambda: bool(agents.by_node[joining.id].holds()))
        assert not creating.done()

        memory.down = False
        created = await asyncio.wait_for(creating, 5)

        assert created.value.state is OperationState.SUCCEEDED
        assert [verb for verb, _ in agents.by_node[joining.id].calls] == ["create"]


async def test_an_agent_that_comes_back_in_time_is_waited_for(storage: Storage) -> None:
    agents = MemoryAgents()
    async with control_plane(storage, agents) as plane, add_node(plane, registration()) as node_id:
        agent = agents.agent(plane.nodes.resolve(node_id).value)
        agent.unreachable = True
        creating = asyncio.create_task(plane.instances.create(draft("web"), mutation()))
        await until(lambda: len(agent.calls) >= 2)
        agent.unreachable = False

        assert (await asyncio.wait_for(creating, 5)).value.state is OperationState.SUCCEEDED


async def test_a_create_on_a_node_that_dies_fails_and_is_cleaned_up_when_it_returns(storage: Storage) -> None:
    agents = MemoryAgents()
    joining = registration()
    async with control_plane(storage, agents) as plane:
        async with add_node(plane, joining):
            agent = agents.agent(plane.nodes.resolve(joining.id).value)
            gate = agent.gates["create"] = asyncio.Event()
            creating = asyncio.create_task(plane.instances.create(draft("web"), mutation()))
            await until(lambda: bool(agent.calls))
            agent.unreachable = True
            gate.set()
        with pytest.raises(Unavailable) as failed:
            await asyncio.wait_for(creating, 10)
        left = plane.instances.resolve(InstanceRef("web")).value
        assert failed.value.reason == "NODE_UNREACHABLE"
        assert left.status is InstanceStatus.DELETING
        assert (await allocation_is_sum(storage))[joining.id].instances == 1

        agent.unreachable = False
        async with add_node(plane, joining):
            await until(lambda: not list(plane.view.instances()))

            assert agent.holds() == set()
            assert (await allocation_is_sum(storage))[joining.id].instances == 0


async def test_a_lost_node_is_offline_its_instances_unknown_and_both_come_back(storage: Storage) -> None:
    agents = MemoryAgents()
    joining = registration()
    async with control_plane(storage, agents) as plane:
        async with add_node(plane, joining):
            await plane.instances.create(draft("web"), mutation())
        await until(
            lambda: plane.instances.resolve(InstanceRef("web")).value.status is InstanceStatus.UNKNOWN
        )
        lost = plane.instances.resolve(InstanceRef("web")).value
        assert plane.nodes.resolve(joining.hostname).value.status is NodeStatus.OFFLINE
        assert lost.status_reason == "NODE_LOST"
        with pytest.raises(Unavailable) as refused:
            await plane.instances.stop(InstanceRef("web"), mutation(), options=FORCE)
        assert refused.value.reason == "NODE_UNREACHABLE"
        with pytest.raises(ResourceExhausted, match="is offline"):
            await plane.instances.create(draft("other"), mutation())

        seen = agents.by_node[joining.id].observe(lost.id)
        async with add_node(plane, replace(joining, observations=(seen,))):
            assert plane.nodes.resolve(joining.hostname).value.status is NodeStatus.READY
            assert plane.instances.resolve(InstanceRef("web")).value.status is InstanceStatus.RUNNING


async def test_what_became_of_an_unclear_stop_is_asked_of_the_node(storage: Storage) -> None:
    agents = MemoryAgents()

    def impatient(settings: ControlPlaneSettings) -> ControlPlaneSettings:
        return replace(settings, executor=replace(settings.executor, stop_s=0.3))

    async with (
        control_plane(storage, agents, change=impatient) as plane,
        add_node(plane, registration()) as node_id,
    ):
        await plane.instances.create(draft("web"), mutation())
        agent = agents.by_node[node_id]
        gate = agent.gates["stop"] = asyncio.Event()
        stopping = asyncio.create_task(plane.instances.stop(InstanceRef("web"), mutation(), options=FORCE))
        await until(lambda: agent.calls[-1][0] == "stop")
        agent.unreachable = True  # for the server; heartbeats go on, and the stop is carried out
        gate.set()
        with pytest.raises(Unavailable):
            await stopping
        assert plane.instances.resolve(InstanceRef("web")).value.status is InstanceStatus.UNKNOWN

        agent.unreachable = False

        await until(
            lambda: plane.instances.resolve(InstanceRef("web")).value.status is not InstanceStatus.UNKNOWN
        )
        assert plane.instances.resolve(InstanceRef("web")).value.status is InstanceStatus.STOPPED


async def test_old_operations_are_forgotten(storage: Storage) -> None:
    def forgetful(settings: ControlPlaneSettings) -> ControlPlaneSettings:
        return replace(
            settings, reconciler=replace(settings.reconciler, retention_s=0.3, purge_interval_s=0.1)
        )

    async with (
        control_plane(storage, MemoryAgents(), change=forgetful) as plane,
        add_node(plane, registration()),
    ):
        await plane.instances.create(draft("web"), mutation("r-1"))
        assert plane.operations.get("r-1").value.done
        assert list(plane.view.unfinished_operations()) == []

        await until(lambda: not list(plane.view.operations()))
        assert plane.instances.resolve(InstanceRef("web")).value.status is InstanceStatus.RUNNING


async def test_the_leader_forgets_old_history(storage: Storage) -> None:
    def forgetful(settings: ControlPlaneSettings) -> ControlPlaneSettings:
        return replace(
            settings, reconciler=replace(settings.reconciler, history_s=0.3, history_interval_s=0.1)
        )

    async with (
        control_plane(storage, MemoryAgents(), change=forgetful) as plane,
        add_node(plane, registration()),
    ):
        before = await storage.current_revision()
        for n in range(3):
            await plane.instances.create(draft(f"i{n}"), mutation())

        async with asyncio.timeout(10):
            while True:
                history = storage.watch(keys.PREFIX, after_revision=before - 1)
                try:
                    await asyncio.wait_for(anext(history), 0.2)
                except Compacted:
                    break
                except TimeoutError:
                    continue
                finally:
                    await history.aclose()
        changes = plane.view.changes(after_revision=before)
        assert await asyncio.wait_for(anext(changes), 5), "what is in memory can still be had"
        assert plane.instances.resolve(InstanceRef("i0")).value.status is InstanceStatus.RUNNING


async def test_a_status_that_cannot_be_recorded_is_refused_as_the_store_refused_it(
    memory: StoreThatFails,
) -> None:
    agents, joining = MemoryAgents(), registration()
    async with control_plane(memory, agents, change=long_leases) as plane:
        await plane.nodes.register(joining)
        await plane.instances.create(draft("web"), mutation())
        ended = agents.by_node[joining.id].end(
            plane.instances.resolve(InstanceRef("web")).value.id, exit_code=1
        )

        memory.down = True
        with pytest.raises(Unavailable) as refused:
            await plane.nodes.update_status(
                joining.id, joining.incarnation, drivers=None, observations=(ended,)
            )
        memory.down = False

        assert refused.value.reason == "STORE_UNAVAILABLE"


class StoreThatKeepsLeases(MemoryStorage):
    """A store whose disk is full: it cannot write that a lease has ended."""

    async def revoke_lease(self, lease_id: str) -> None:
        raise ResourceExhausted("the disk is full", reason="STORE_DISK_FULL")


async def test_a_full_store_does_not_keep_a_server_from_leaving() -> None:
    storage = StoreThatKeepsLeases(SystemClock())
    async with control_plane(storage, MemoryAgents(), change=long_leases) as plane:
        record = keys.server_lease(plane.membership.record.id).path
        joined_before = plane.view.mod_revision(record)
        staying = asyncio.create_task(plane.membership.run())
        await until(lambda: plane.view.mod_revision(record) > joined_before)

        staying.cancel()
        await asyncio.wait({staying})

        assert staying.cancelled()
    await storage.aclose()


async def test_a_result_waits_for_room_on_the_stores_disk(memory: StoreThatFails) -> None:
    agents, joining = MemoryAgents(), registration()
    async with control_plane(memory, agents, change=long_leases) as plane:
        await plane.nodes.register(joining)
        gate = agents.agent(plane.nodes.resolve(joining.id).value).gates["create"] = asyncio.Event()
        begun = await plane.instances.create(draft("web"), mutation(wait=False))
        await until(lambda: bool(agents.by_node[joining.id].calls))

        memory.full = True
        gate.set()
        await until(lambda: memory.refusals > 0)
        memory.full = False

        done = await plane.operations.wait(begun.value.id, timeout_s=5)
        assert done.value.state is OperationState.SUCCEEDED


async def test_a_failed_create_that_cannot_be_cleaned_up_keeps_its_reservation(storage: Storage) -> None:
    agents, joining = MemoryAgents(), registration()
    async with control_plane(storage, agents) as plane, add_node(plane, joining):
        agent = agents.agent(plane.nodes.resolve(joining.id).value)
        agent.failures["create"] = Internal("it broke half-way", reason="INTERNAL")
        agent.failures["delete"] = Unavailable("gone", reason="NODE_UNREACHABLE")
        gate = agent.gates["delete"] = asyncio.Event()
        creating = asyncio.create_task(plane.instances.create(draft("web"), mutation()))
        await until(lambda: "delete" in dict(agent.calls))
        gate.set()
        agent.gates["delete"] = asyncio.Event()

        with pytest.raises(Internal):
            await creating

        assert (await allocation_is_sum(storage))[joining.id].instances == 1
        agent.gates["delete"].set()
        await until(lambda: not list(plane.view.instances()))
        assert (await allocation_is_sum(storage))[joining.id].instances == 0
