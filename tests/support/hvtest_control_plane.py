"""A control plane for tests: one or several servers over one store, agents in memory, and short ways to use them."""

import asyncio
import random
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from hypervisor.core.availability import FencingState, NodeFencing
from hypervisor.core.clock import Clock, SystemClock
from hypervisor.core.ids import new_id
from hypervisor.core.model import (
    Allocation,
    Capability,
    DriverInfo,
    Instance,
    InstanceSpec,
    InstancesUsage,
    NodeResources,
    Observation,
    decode,
)
from hypervisor.core.resources import GIB, ZERO
from hypervisor.core.retry import Backoff
from hypervisor.core.states import DesiredState, InstanceType, NodeRole
from hypervisor.server import keys
from hypervisor.server.agents import Agents
from hypervisor.server.control_plane import ControlPlane, ControlPlaneSettings, ImageSettings
from hypervisor.server.executor import ExecutorSettings
from hypervisor.server.live_moves import LiveMoves
from hypervisor.server.reconcile.loop import ReconcilerSettings
from hypervisor.server.reconcile.losses import LossLimits
from hypervisor.server.reconcile.node_loop import NodeReconcilerSettings
from hypervisor.server.scheduler.default import DefaultScheduler
from hypervisor.server.services import (
    Caller,
    HeartbeatTimes,
    InstanceDraft,
    Mutation,
    NodeRegistration,
)
from hypervisor.server.store.storage import Storage
from hypervisor.server.view import ViewSettings

__all__ = [
    "ARMED",
    "add_node",
    "allocation_is_sum",
    "control_plane",
    "draft",
    "fake_driver",
    "mutation",
    "registration",
    "settings",
    "until",
]

ARMED = NodeFencing(state=FencingState.ARMED)
VERBS = ("create", "start", "stop", "restart", "delete", "stats", "console")


def settings(server_id: str = "s-1") -> ControlPlaneSettings:
    """Settings with short times."""
    return ControlPlaneSettings(
        server_id=server_id,
        address="127.0.0.1:50051",
        version="test",
        # Made when an image is imported, and not before.
        images=ImageSettings(Path(tempfile.gettempdir()) / f"hvtest-images-{uuid.uuid4().hex}"),
        heartbeat=HeartbeatTimes(0.5, 1.0),
        server_ttl_s=1.0,
        view=ViewSettings(verify_interval_s=0.2, lag_timeout_s=0.5, retry_s=0.05),
        executor=ExecutorSettings(
            create_s=20.0, cleanup_s=1.0, slow_s=0.1, backoff=Backoff(initial_s=0.02, maximum_s=0.1)
        ),
        losses=LossLimits(margin_s=0.3),
        reconciler=ReconcilerSettings(
            interval_s=0.1,
            leader_ttl_s=1.0,
            retry_s=0.05,
            nodes=NodeReconcilerSettings(interval_s=0.5, orphan_grace_s=0.5, again_s=0.1, timeout_s=2.0),
        ),
    )


@asynccontextmanager
async def control_plane(
    storage: Storage,
    agents: Agents,
    *,
    clock: Clock | None = None,
    change: Callable[[ControlPlaneSettings], ControlPlaneSettings] = lambda s: s,
    server_id: str = "s-1",
    live: LiveMoves | None = None,
) -> AsyncIterator[ControlPlane]:
    """A server that runs inside the context. Leaving it cancels it, as a crash does (its lease is left to end)."""
    plane = ControlPlane(
        storage,
        agents,
        DefaultScheduler(),
        clock or SystemClock(),
        new_id=new_id,
        rng=random.Random(1),
        settings=change(settings(server_id)),
        live=live,
    )
    running = asyncio.create_task(plane.run(), name=server_id)
    try:
        ready = asyncio.create_task(plane.ready())
        async with asyncio.timeout(10):
            await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            ready.cancel()
            running.result()
        yield plane
        if running.done():
            running.result()
    finally:
        running.cancel()
        await asyncio.wait({running})


def fake_driver(
    *types: InstanceType, available: bool = True, lacks: Mapping[str, str] | None = None
) -> DriverInfo:
    """A driver that can do everything, but for what it lacks (verb: reason)."""
    missing = lacks or {}
    return DriverInfo(
        name="fake",
        types=types or tuple(InstanceType),
        available=available,
        reason="" if available else "it was told not to work",
        capabilities=tuple(
            Capability(verb=verb, supported=verb not in missing, reason=missing.get(verb, ""))
            for verb in VERBS
        ),
    )


def registration(
    hostname: str = "node-1",
    *,
    cpu_cores: float = 4,
    memory_bytes: int = 8 * GIB,
    node_id: str = "",
    labels: Mapping[str, str] | None = None,
    drivers: tuple[DriverInfo, ...] | None = None,
    incarnation: str = "",
    observations: tuple[Observation, ...] = (),
    port: int = 50052,
    zone: str = "default",
    fencing: NodeFencing | None = ARMED,
) -> NodeRegistration:
    """What an agent says when it joins."""
    return NodeRegistration(
        id=node_id or new_id("n"),
        hostname=hostname,
        address="127.0.0.1",
        port=port,
        region="default",
        zone=zone,
        role=NodeRole.WORKER,
        resources=NodeResources(
            cpu_millis=round(cpu_cores * 1000), memory_bytes=memory_bytes, disk_bytes=100 * GIB
        ),
        labels=labels or {},
        drivers=drivers if drivers is not None else (fake_driver(),),
        agent_version="test",
        incarnation=incarnation or uuid.uuid4().hex,
        simulated=True,
        observations=observations,
        fencing=fencing,
    )


@asynccontextmanager
async def add_node(plane: ControlPlane, joining: NodeRegistration) -> AsyncIterator[str]:
    """A node whose agent sends heartbeats inside the context; yields its id."""
    node, times = await plane.nodes.register(joining)

    async def beat() -> None:
        while True:
            await asyncio.sleep(times.interval_s / 2)
            await plane.nodes.heartbeat(
                joining.id,
                joining.incarnation,
                joining.resources,
                {},
                usage=InstancesUsage(),
                fencing=joining.fencing,
            )

    beating = asyncio.create_task(beat())
    try:
        yield node.value.id
    finally:
        beating.cancel()
        await asyncio.wait({beating})


def draft(name: str, *, cpu_cores: float = 1, memory_mb: int = 64, **changes: object) -> InstanceDraft:
    """A create request; ``changes`` are of the spec."""
    return InstanceDraft(
        name=name,
        project="default",
        type=InstanceType.CONTAINER,
        spec=InstanceSpec(
            image="busybox",
            cpu_millis=round(cpu_cores * 1000),
            memory_mb=memory_mb,
            **changes,  # type: ignore[arg-type]
        ),
        labels={},
        desired=DesiredState.RUNNING,
    )


def mutation(request_id: str = "", *, digest: str = "d", wait: bool = True) -> Mutation:
    """A mutating call by ``alice``."""
    return Mutation(Caller("alice", uuid.uuid4().hex), request_id, digest, wait)


async def until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    """Return when the condition holds; fail after ``timeout_s``."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (conditions are about several objects, none of which has an event)
            await asyncio.sleep(0.005)


async def allocation_is_sum(storage: Storage) -> dict[str, Allocation]:
    """Assert, in the store itself, that each allocation is the sum of what is placed and what moves hold there.

    Returns them.
    """
    page = await storage.list(keys.PREFIX, limit=10_000)
    assert not page.next_key
    instances = [
        decode(Instance, i.value, key=i.key) for i in page.items if i.key.startswith(keys.instance("").path)
    ]
    allocations = {}
    for item in page.items:
        if item.key.startswith(keys.allocation("").path):
            held = decode(Allocation, item.value, key=item.key)
            placed = [i for i in instances if i.node_id == held.node_id]
            moves = [i.holds_elsewhere for i in instances if i.holds_elsewhere is not None]
            moving = [amount for node_id, amount in moves if node_id == held.node_id]
            assert held.reserved == sum((*(i.holds for i in placed), *moving), ZERO), held
            assert held.instances == len(placed) + len(moving), held
            allocations[held.node_id] = held
    names = {i.key for i in page.items if i.key.startswith("/hypervisor/names/")}
    assert names == {keys.name(i.project, i.name).path for i in instances}
    return allocations


def without_cleanup(base: ControlPlaneSettings) -> ControlPlaneSettings:
    """Settings whose reconciler never acts."""
    return replace(base, reconciler=replace(base.reconciler, interval_s=3600.0))
