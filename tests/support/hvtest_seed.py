"""A store that holds a cluster already: what a server finds that is started on it."""

from datetime import UTC, datetime
from pathlib import Path

from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import derived_id
from hypervisor.core.model import Allocation, Instance, InstanceSpec, Node, encode
from hypervisor.core.resources import GIB, Resources
from hypervisor.core.states import DesiredState, InstanceStatus, InstanceType, NodeStatus
from hypervisor.server import keys
from hypervisor.server.records import NameClaim
from hypervisor.server.store.config import StoreConfig
from hypervisor.server.store.open import open_storage
from hypervisor.server.store.storage import Put

__all__ = ["seed_instances", "seeded_instance"]

_CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_NODE_ID = derived_id("n", "seeded")


def seeded_instance(number: int) -> Instance:
    """The instance of this number. Its node is lost, so that no server does anything with it."""
    return Instance(
        id=derived_id("i", "seeded", str(number)),
        name=f"web-{number:05d}",
        project="default",
        type=InstanceType.CONTAINER,
        spec=InstanceSpec(image="docker.io/library/busybox:1.36", command=("sleep", "600"), env={"A": "1"}),
        status=InstanceStatus.UNKNOWN,
        status_reason="NODE_LOST",
        desired=DesiredState.STOPPED,
        created_at=_CREATED,
        updated_at=_CREATED,
        labels={"tier": "web" if number % 2 else "db", "number": str(number)},
        node_id=_NODE_ID,
    )


async def seed_instances(path: Path, count: int) -> None:
    """Write a store file with one lost node and ``count`` instances on it."""
    storage = await open_storage(StoreConfig(backend="sqlite", path=str(path)), SystemClock())
    try:
        node = Node(
            id=_NODE_ID,
            hostname="seeded",
            address="127.0.0.1",
            port=1,
            created_at=_CREATED,
            updated_at=_CREATED,
            status=NodeStatus.OFFLINE,
            capacity=Resources(cpu_millis=10**9, memory_bytes=10**6 * GIB, disk_bytes=0),
        )
        spec = seeded_instance(0).spec.resources
        reserved = Resources(cpu_millis=spec.cpu_millis * count, memory_bytes=spec.memory_bytes * count)
        allocation = Allocation(node_id=_NODE_ID, reserved=reserved, instances=count)
        await storage.commit(
            [],
            [
                Put(keys.node(_NODE_ID).path, encode(node)),
                Put(keys.allocation(_NODE_ID).path, encode(allocation)),
            ],
        )
        for begin in range(0, count, 50):
            puts = []
            for instance in map(seeded_instance, range(begin, min(begin + 50, count))):
                puts.append(Put(keys.instance(instance.id).path, encode(instance)))
                claim = NameClaim(instance_id=instance.id)
                puts.append(Put(keys.name(instance.project, instance.name).path, encode(claim)))
            await storage.commit([], puts)
    finally:
        await storage.aclose()
