"""A node's manager over the fake driver and a real journal, without gRPC: what most agent tests need."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hypervisor.agent.console import ConsoleLimits
from hypervisor.agent.console_holder.launching import EmbeddedHolder
from hypervisor.agent.consoles import ConsoleHubs
from hypervisor.agent.disk import Disk
from hypervisor.agent.drivers.driver import Assignment, Driver
from hypervisor.agent.drivers.fake import FakeConfig, FakeDriver
from hypervisor.agent.drivers.guard import DriverDeadlines, GuardedDriver
from hypervisor.agent.drivers.health import DriverHealth, OfferedDriver
from hypervisor.agent.drivers.instances import InstanceRef, LocalInstances
from hypervisor.agent.drivers.manager import Manager
from hypervisor.agent.drivers.observed import ObservationBook
from hypervisor.agent.journal import Journal
from hypervisor.agent.stats.service import StatsService
from hypervisor.core.clock import SystemClock
from hypervisor.core.ids import new_id
from hypervisor.core.model import DriverInfo, InstanceSpec, Observation
from hypervisor.core.restarts import RestartPolicy
from hypervisor.core.states import InstanceType

__all__ = ["NodeUnderTest", "assignment", "node_under_test", "ref"]

SHORT = DriverDeadlines(create_s=5.0, action_s=5.0, query_s=5.0, abandon_s=0.05)


def assignment(
    instance_id: str | None = None,
    *,
    command: tuple[str, ...] = (),
    image: str = "fake",
    kind: InstanceType = InstanceType.CONTAINER,
    generation: int = 1,
    epoch: int = 1,
    restart: RestartPolicy | None = None,
) -> Assignment:
    """The smallest legal assignment."""
    return Assignment(
        instance_id=instance_id or new_id("i"),
        name="web",
        project="default",
        type=kind,
        spec=InstanceSpec(image=image, memory_mb=64, command=command, restart=restart),
        generation=generation,
        epoch=epoch,
    )


def ref(wanted: Assignment, *, generation: int | None = None, epoch: int | None = None) -> InstanceRef:
    """The ref of an assignment, with another generation or epoch where given."""
    return InstanceRef(wanted.instance_id, generation or wanted.generation, epoch or wanted.epoch)


@dataclass
class Recorded:
    """What the manager told its listener."""

    consoles: ConsoleHubs
    stats: StatsService
    reports: list[Observation] = field(default_factory=list)
    """Observations nobody got as an answer."""
    gone: list[str] = field(default_factory=list)

    def observed(self, seen: Observation, *, driver: str, answered: bool) -> None:
        self.consoles.observed(seen)
        self.stats.observed(seen)
        if not answered:
            self.reports.append(seen)

    def deleted(self, instance_id: str) -> None:
        self.consoles.deleted(instance_id)
        self.stats.deleted(instance_id)
        self.gone.append(instance_id)


@dataclass
class NodeUnderTest:
    """The parts of a node that a test looks at."""

    manager: Manager
    driver: FakeDriver
    health: DriverHealth
    journal: Journal
    told: Recorded
    consoles: ConsoleHubs
    stats: StatsService


@asynccontextmanager
async def node_under_test(
    directory: Path,
    *,
    driver: FakeDriver | None = None,
    disk: Disk | None = None,
    deadlines: DriverDeadlines = SHORT,
    missing: tuple[DriverInfo, ...] = (),
    types: tuple[InstanceType, ...] = (InstanceType.CONTAINER,),
    stats_interval_s: float = 0.1,
) -> AsyncIterator[NodeUnderTest]:
    """A node that has started. Leaving the context is a crash: nothing is finished or cleaned up but the tasks."""
    clock = SystemClock()
    os.makedirs(directory, exist_ok=True)
    fake = driver or FakeDriver(FakeConfig(state_dir=directory / "fake"), clock=clock)
    rng = random.Random(1)
    async with Journal(directory / "journal", disk=disk) as journal:
        health = DriverHealth(
            [OfferedDriver(GuardedDriver(_as_driver(fake), deadlines=deadlines), types)],
            missing=missing,
            clock=clock,
            poll_s=0.02,
        )
        consoles = ConsoleHubs(
            attach=lambda instance_id: manager.attach(instance_id),
            clock=clock,
            rng=rng,
            launcher=EmbeddedHolder(directory),
            limits=ConsoleLimits(scrollback_bytes=64 << 10, log_bytes=1 << 20, log_files=2),
        )
        stats = StatsService(
            locate=lambda instance_id: manager.stats_source(instance_id),
            clock=clock,
            interval_s=stats_interval_s,
            slow_interval_s=max(stats_interval_s, 1.0),
            history=100,
        )
        told = Recorded(consoles, stats)
        instances = LocalInstances(
            journal=journal, book=ObservationBook(starts=journal.starts), clock=clock, listener=told, rng=rng
        )
        manager = Manager(instances=instances, drivers=health, clock=clock, rng=rng)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(work) for work in (consoles.run(), stats.run(), manager.run(), health.run())
            ]
            await manager.ready()
            try:
                yield NodeUnderTest(manager, fake, health, journal, told, consoles, stats)
            finally:
                for task in tasks:
                    task.cancel()
    if driver is None:
        await fake.aclose()


def _as_driver(driver: Driver) -> Driver:
    return driver
