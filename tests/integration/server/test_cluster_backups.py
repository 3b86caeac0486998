"""Backups: true at one revision, whole or refused, restored by one try or several, and no guest is disturbed."""

import dataclasses
from collections.abc import Sequence

import msgspec
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
from hypervisor.core.backup_file import BackupHeader, BackupRecord, BackupWriter, read_backup
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import FailedPrecondition, InvalidArgument, Unavailable
from hypervisor.core.model import Allocation, Instance
from hypervisor.core.states import InstanceStatus, NodeStatus, OperationState
from hypervisor.server import keys
from hypervisor.server.agents import CallContext
from hypervisor.server.control_plane import ControlPlane
from hypervisor.server.services import InstanceRef, StopOptions
from hypervisor.server.store.memory import MemoryStorage
from hypervisor.server.store.storage import Committed, Compare, Conflicted, Put, Storage
from hypervisor.server.store.storage import Operation as StoreOperation


async def whole(plane: ControlPlane) -> bytes:
    return b"".join([piece async for piece in plane.backups.backup()])


def remade(data: bytes, change: dict[str, bytes]) -> bytes:
    """The backup with other records."""
    header, records, _ = read_backup(data)
    values = {record.key: bytes(record.value) for record in records} | change
    return made(header, values)


def made(header: BackupHeader, values: dict[str, bytes]) -> bytes:
    writer = BackupWriter(header)
    records = (BackupRecord(key=key, value=msgspec.Raw(value)) for key, value in values.items())
    return b"".join([*writer.add(records), writer.end()])


def instance(plane: ControlPlane, name: str) -> Instance:
    found = plane.view.instance_named("default", name)
    assert found is not None
    return found.value


async def test_guests_go_on_over_the_restore_of_a_backup(storage: Storage) -> None:
    agents, joining, fresh = MemoryAgents(), registration(), MemoryStorage(SystemClock())
    async with control_plane(storage, agents) as plane, add_node(plane, joining):
        await plane.instances.create(draft("web"), mutation("r-1"))
        data = await whole(plane)
        cluster_id = plane.view.cluster_id()
        await plane.instances.create(draft("later"), mutation("r-2"))
    agent = agents.by_node[joining.id]
    calls = len(agent.calls)

    async with control_plane(fresh, agents, server_id="s-2") as plane:
        restored = await plane.backups.restore(data)

        assert (restored.nodes, restored.instances, restored.cluster_id) == (1, 1, cluster_id)
        assert plane.view.cluster_id() == cluster_id
        assert plane.nodes.resolve(joining.id).value.status is NodeStatus.OFFLINE
        assert plane.view.instance_named("default", "later") is None
        seen = tuple(agent.observe(instance_id) for instance_id in sorted(agent.held))
        async with add_node(plane, dataclasses.replace(joining, observations=seen)):
            await until(lambda: instance(plane, "web").status is InstanceStatus.RUNNING)
            await allocation_is_sum(fresh)
            assert [c for c in agent.calls[calls:] if c[0] != "list"] == []
            stopped = await plane.instances.stop(InstanceRef("web"), mutation("r-3"), options=StopOptions())
            assert stopped.value.state is OperationState.SUCCEEDED
            assert instance(plane, "web").status is InstanceStatus.STOPPED


async def test_a_backup_has_no_leases_and_is_true_at_its_revision(storage: Storage) -> None:
    agents, joining = MemoryAgents(), registration()
    async with control_plane(storage, agents) as plane, add_node(plane, joining):
        await plane.instances.create(draft("web"), mutation("r-1"))
        pieces = plane.backups.backup()
        data = await anext(pieces)
        await plane.instances.create(draft("meanwhile"), mutation("r-2"))
        data += b"".join([piece async for piece in pieces])

    header, records, _ = read_backup(data)
    found = {record.key for record in records}
    assert header.cluster_id == plane.view.cluster_id()
    assert not any("/leases/" in key or "/elections/" in key for key in found)
    assert keys.name("default", "web").path in found


async def test_what_was_placed_elsewhere_since_the_backup_is_taken_over(storage: Storage) -> None:
    agents, old, new = MemoryAgents(), registration("old"), registration("new", port=50053)
    fresh = MemoryStorage(SystemClock())
    async with control_plane(storage, agents) as plane, add_node(plane, old), add_node(plane, new):
        await plane.instances.create(draft("web", node="old"), mutation("r-1"))
        data = await whole(plane)
        web = instance(plane, "web")
        # Placed anew on the other node, and its first copy is gone: the backup knows of neither.
        agents.by_node[old.id].held.clear()
        moved = msgspec.structs.replace(web, node_id=new.id, epoch=2)
        await agents.agent(plane.nodes.resolve(new.id).value).create(
            moved, CallContext("r-9", 5.0), start=True
        )

    async with control_plane(fresh, agents, server_id="s-2") as plane:
        await plane.backups.restore(data)
        seen = (agents.by_node[new.id].observe(web.id),)
        async with (
            add_node(plane, dataclasses.replace(new, observations=seen)),
            add_node(plane, old),
        ):
            await until(lambda: instance(plane, "web").status is InstanceStatus.RUNNING)

            assert (instance(plane, "web").node_id, instance(plane, "web").epoch) == (new.id, 2)
            held = await allocation_is_sum(fresh)
            assert held[old.id] == Allocation(node_id=old.id)
            assert held[new.id].instances == 1


class BreaksOff(MemoryStorage):
    """Fails at the commit with the records of instances, as often as it is told."""

    failures = 0

    async def commit(
        self, compares: Sequence[Compare], operations: Sequence[StoreOperation]
    ) -> Committed | Conflicted:
        writes = any(isinstance(o, Put) and o.key.startswith(keys.instance("").path) for o in operations)
        if writes and self.failures:
            self.failures -= 1
            raise Unavailable("the store is gone", reason="STORE_UNAVAILABLE")
        return await super().commit(compares, operations)


async def test_a_restore_that_broke_off_holds_everything_until_it_is_finished(storage: Storage) -> None:
    agents, joining, fresh = MemoryAgents(), registration(), BreaksOff(SystemClock())
    async with control_plane(storage, agents) as plane, add_node(plane, joining):
        await plane.instances.create(draft("web"), mutation("r-1"))
        data = await whole(plane)

    fresh.failures = 1
    async with control_plane(fresh, agents, server_id="s-2") as plane:
        with pytest.raises(Unavailable):
            await plane.backups.restore(data)
        await until(lambda: plane.view.restoring)
        with pytest.raises(Unavailable) as refused:
            await plane.nodes.register(joining)
        assert refused.value.reason == "CLUSTER_RESTORING"
    # Another server can join, takes no change either, and finishes it.
    async with control_plane(fresh, agents, server_id="s-3") as plane:
        with pytest.raises(Unavailable):
            await plane.instances.create(draft("web"), mutation("r-2"))
        with pytest.raises(FailedPrecondition) as other:
            await plane.backups.restore(remade(data, {"/hypervisor/x": b"{}"}))
        assert other.value.reason == "RESTORE_UNFINISHED"

        restored = await plane.backups.restore(data)

        assert restored.instances == 1
        assert not plane.view.restoring
        assert instance(plane, "web").status is not InstanceStatus.FAILED
        await plane.nodes.register(joining)


async def test_a_cluster_with_instances_of_its_own_is_left_alone(storage: Storage) -> None:
    agents, joining = MemoryAgents(), registration()
    async with control_plane(storage, agents) as plane, add_node(plane, joining):
        data = await whole(plane)
        await plane.instances.create(draft("web"), mutation("r-1"))
        revision = plane.view.revision

        with pytest.raises(FailedPrecondition) as refused:
            await plane.backups.restore(data)

        assert refused.value.reason == "CLUSTER_NOT_EMPTY"
        assert not plane.view.restoring
        assert plane.view.revision == revision


@pytest.mark.parametrize("spoil", ["cut", "bit", "end", "empty", "other"])
async def test_a_damaged_file_is_refused_and_changes_nothing(spoil: str) -> None:
    fresh = MemoryStorage(SystemClock())
    async with control_plane(fresh, MemoryAgents()) as plane:
        data = await whole(plane)
        damaged = {
            "cut": data[:-40],
            "bit": data.replace(b"cluster_id", b"cluster_iq", 1),
            "end": data[: data.rstrip(b"\n").rindex(b"\n") + 1],
            "empty": b"",
            "other": b"#!/bin/sh\nexit 0\n",
        }[spoil]
        revision = plane.view.revision

        with pytest.raises(InvalidArgument) as refused:
            await plane.backups.restore(damaged)

        assert refused.value.reason == "BACKUP_DAMAGED"
        assert plane.view.revision == revision


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (keys.instance("i-1").path, b'{"id":"i-1"}'),
        (keys.allocation("n-1").path, b'{"node_id":"n-1","v":99}'),
        ("/elsewhere/x", b"{}"),
        (keys.server_lease("s-9").path, b"{}"),
    ],
)
async def test_a_record_that_cannot_be_read_is_named_before_anything_is_written(
    key: str, value: bytes
) -> None:
    fresh = MemoryStorage(SystemClock())
    async with control_plane(fresh, MemoryAgents()) as plane:
        data = remade(await whole(plane), {key: value})

        with pytest.raises(InvalidArgument, match=key) as refused:
            await plane.backups.restore(data)

        assert refused.value.reason == "BACKUP_UNREADABLE"
        assert not plane.view.restoring


async def test_what_a_later_version_wrote_stays_when_this_one_writes(storage: Storage) -> None:
    agents, joining = MemoryAgents(), registration()
    async with control_plane(storage, agents) as plane, add_node(plane, joining):
        await plane.instances.create(draft("web"), mutation("r-1"))
        key = keys.instance(instance(plane, "web").id).path
        item = await storage.get(key)
        assert item is not None
        later = msgspec.json.decode(item.value)
        later["since_later"] = {"a": 1}
        later["spec"]["also_later"] = [1, 2]
        outcome = await storage.commit(
            [Compare(key, item.mod_revision)], [Put(key, msgspec.json.encode(later))]
        )
        assert isinstance(outcome, Committed)
        await plane.view.wait_revision(outcome.revision)

        await plane.instances.stop(InstanceRef("web"), mutation("r-2"), options=StopOptions())
        await plane.instances.start(InstanceRef("web"), mutation("r-3"))

        now = await storage.get(key)
        assert now is not None
        kept = msgspec.json.decode(now.value)
        assert (kept["since_later"], kept["spec"]["also_later"]) == ({"a": 1}, [1, 2])
        assert now.mod_revision > outcome.revision
        assert instance(plane, "web").status is InstanceStatus.RUNNING
