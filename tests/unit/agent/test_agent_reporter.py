"""Delivery of reports: newest wins, batches, retries, bounds."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from hvtest_agent_waiting import until
from hypervisor.agent.cluster_link import HeartbeatTimes, NodeDescription
from hypervisor.agent.reporter import Reporter
from hypervisor.core.clock import SystemClock
from hypervisor.core.errors import HypervisorError, NotFound, Unavailable
from hypervisor.core.model import DriverInfo, InstanceStats, InstancesUsage, NodeResources, Observation
from hypervisor.core.states import InstanceStatus, NodeRole

NODE = NodeDescription(
    id="n-1",
    hostname="node-1",
    address="127.0.0.1",
    port=1,
    region="default",
    zone="default",
    role=NodeRole.WORKER,
    labels={},
    agent_version="1",
    incarnation="a-1",
    simulated=False,
)


class Link:
    """Takes reports; fails with what stands in ``failing`` first."""

    def __init__(self) -> None:
        self.batches: list[tuple[tuple[DriverInfo, ...], tuple[Observation, ...]]] = []
        self.failing: list[HypervisorError] = []

    async def register(
        self,
        node: NodeDescription,
        *,
        resources: NodeResources,
        drivers: Sequence[DriverInfo],
        observations: Sequence[Observation],
    ) -> HeartbeatTimes:
        raise AssertionError("a reporter does not register")

    async def heartbeat(
        self,
        node: NodeDescription,
        *,
        resources: NodeResources,
        usage: InstancesUsage,
        stats: Mapping[str, InstanceStats],
        images: Sequence[str] = (),
    ) -> HeartbeatTimes:
        raise AssertionError("a reporter sends no heartbeats")

    async def update_status(
        self, node: NodeDescription, *, drivers: Sequence[DriverInfo], observations: Sequence[Observation]
    ) -> tuple[str, ...]:
        if self.failing:
            raise self.failing.pop(0)
        self.batches.append((tuple(drivers), tuple(observations)))
        return ()

    @property
    def delivered(self) -> list[Observation]:
        return [seen for _, batch in self.batches for seen in batch]


class Parts:
    def __init__(self, *, limit: int = 1000) -> None:
        self.link = Link()
        self.registered = asyncio.Event()
        self.registered.set()
        self.again = 0
        self.reporter = Reporter(
            NODE,
            link=self.link,
            clock=SystemClock(),
            rng=random.Random(1),
            registered=self.registered,
            register_again=self._again,
            limit=limit,
        )

    def _again(self) -> None:
        self.again += 1


@asynccontextmanager
async def running(parts: Parts) -> AsyncIterator[Parts]:
    task = asyncio.ensure_future(parts.reporter.run())
    try:
        yield parts
    finally:
        task.cancel()
        await asyncio.wait({task})


def seen(instance_id: str, sequence: int) -> Observation:
    return Observation(
        instance_id=instance_id,
        generation=1,
        epoch=1,
        status=InstanceStatus.STOPPED,
        observed_at=datetime(2026, 1, 1, tzinfo=UTC),
        sequence=sequence,
    )


async def test_only_the_newest_of_an_instance_is_sent() -> None:
    parts = Parts()
    for sequence in (1, 3, 2):
        parts.reporter.observation(seen("a", sequence))
    parts.reporter.observation(seen("b", 1))

    async with running(parts):
        await until(lambda: parts.link.batches, what="a batch is delivered")

    assert [(o.instance_id, o.sequence) for o in parts.link.delivered] == [("a", 3), ("b", 1)]


async def test_many_go_in_batches() -> None:
    parts = Parts(limit=5000)
    for number in range(1200):
        parts.reporter.observation(seen(f"i-{number}", 1))

    async with running(parts):
        await until(lambda: len(parts.link.delivered) == 1200, what="all are delivered")

    assert [len(batch) for _, batch in parts.link.batches] == [500, 500, 200]


async def test_a_failed_delivery_is_repeated_with_what_is_newest_then() -> None:
    parts = Parts()
    parts.link.failing = [Unavailable("away"), Unavailable("away")]
    parts.reporter.observation(seen("a", 1))
    parts.reporter.observation(seen("b", 1))

    async with running(parts):
        await until(lambda: len(parts.link.failing) < 2, what="the first delivery fails")
        parts.reporter.observation(seen("a", 2))
        await until(lambda: parts.link.batches, what="a later one succeeds")

    assert {(o.instance_id, o.sequence) for o in parts.link.delivered} == {("a", 2), ("b", 1)}
    assert parts.reporter.waiting == 0


async def test_a_server_that_does_not_know_the_node_is_told_to_by_a_new_registration() -> None:
    parts = Parts()
    parts.link.failing = [NotFound("who?", reason="NODE_NOT_FOUND")]
    parts.reporter.observation(seen("a", 1))

    async with running(parts):
        await until(lambda: parts.again, what="a registration is asked for")
        assert parts.link.batches == []
        parts.registered.set()
        await until(lambda: parts.link.batches, what="the report is delivered after it")

    assert parts.again == 1


async def test_nothing_is_sent_before_the_registration() -> None:
    parts = Parts()
    parts.registered.clear()
    parts.reporter.observation(seen("a", 1))

    async with running(parts):
        for _ in range(20):
            await asyncio.sleep(0)
        assert parts.link.batches == []
        parts.registered.set()

        await until(lambda: parts.link.batches, what="the report is delivered")


async def test_a_full_queue_drops_the_oldest_and_counts() -> None:
    parts = Parts(limit=3)
    for number in range(5):
        parts.reporter.observation(seen(f"i-{number}", 1))

    async with running(parts):
        await until(lambda: parts.link.batches, what="the rest is delivered")

    assert [o.instance_id for o in parts.link.delivered] == ["i-2", "i-3", "i-4"]
    assert parts.reporter.dropped == 2


async def test_drivers_are_reported_as_they_are_last() -> None:
    parts = Parts()
    down, up = (DriverInfo(name="fake", types=(), available=available) for available in (False, True))
    parts.reporter.drivers((down,))
    parts.reporter.drivers((up,))

    async with running(parts):
        await until(lambda: parts.link.batches, what="the drivers are delivered")

    assert parts.link.batches == [((up,), ())]


async def test_a_deleted_instance_is_not_reported_any_more() -> None:
    parts = Parts()
    parts.reporter.observation(seen("a", 1))
    parts.reporter.observation(seen("b", 1))

    parts.reporter.deleted("a")

    async with running(parts):
        await until(lambda: parts.link.batches, what="the rest is delivered")
    assert [o.instance_id for o in parts.link.delivered] == ["b"]
