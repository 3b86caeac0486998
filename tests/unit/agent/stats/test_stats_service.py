"""The statistics service over a feed in memory, on a clock that the test moves."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from hvtest_agent_waiting import until, within
from hypervisor.agent.stats.service import StatsService
from hypervisor.agent.stats.sources import StatsSource
from hypervisor.core.errors import FailedPrecondition, Internal, NotFound, Unavailable
from hypervisor.core.model import InstanceStats, Observation
from hypervisor.core.states import InstanceStatus

START = datetime(2026, 5, 6, tzinfo=UTC)


class SteppedClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> datetime:
        return START + timedelta(seconds=self._now)

    def monotonic(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._now + seconds, waiting))
        await waiting

    async def advance(self, seconds: float) -> None:
        """Move on in steps of 50 ms; after each, whoever slept till then has done what it does."""
        end = self._now + seconds
        while self._now < end - 1e-9:
            self._now = min(self._now + 0.05, end)
            for entry in sorted(self._sleepers, key=lambda e: e[0]):
                if entry[0] <= self._now + 1e-9:
                    self._sleepers.remove(entry)
                    if not entry[1].done():
                        entry[1].set_result(None)
            for _ in range(20):
                await asyncio.sleep(0)


class MemoryFeed:
    """A runtime whose instances use one core."""

    def __init__(self, clock: SteppedClock) -> None:
        self._clock = clock
        self.running: set[str] = set()
        self.reads: list[tuple[str, ...]] = []
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def read(self, instance_ids: Sequence[str]) -> Mapping[str, Mapping[str, int]]:
        self.reads.append(tuple(instance_ids))
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        used = round(self._clock.monotonic() * 1e9)
        return {i: {"cpu_usage_ns": used, "pids": 2} for i in instance_ids if i in self.running}


class Node:
    """The service, and a driver that finds what runs."""

    def __init__(self, *, interval_s: float = 1.0, history: int = 300) -> None:
        self.clock = SteppedClock()
        self.feed = MemoryFeed(self.clock)
        self.located: list[str] = []
        self.locate_failure: Exception | None = None
        self.stats = StatsService(
            locate=self._locate,
            clock=self.clock,
            interval_s=interval_s,
            slow_interval_s=10.0,
            history=history,
        )

    async def _locate(self, instance_id: str) -> StatsSource:
        self.located.append(instance_id)
        if self.locate_failure is not None:
            raise self.locate_failure
        if instance_id not in self.feed.running:
            raise NotFound(f"no {instance_id}", reason="INSTANCE_NOT_FOUND")
        return self.feed

    def start(self, *instance_ids: str) -> None:
        for instance_id in instance_ids:
            self.feed.running.add(instance_id)
            self.stats.observed(_seen(instance_id, InstanceStatus.RUNNING, self.clock.now()))

    def stop(self, instance_id: str) -> None:
        self.feed.running.discard(instance_id)
        self.stats.observed(_seen(instance_id, InstanceStatus.STOPPED, None))

    def samplings(self, instance_id: str) -> int:
        """How often it was asked for."""
        return sum(instance_id in asked for asked in self.feed.reads)


def _seen(instance_id: str, status: InstanceStatus, started_at: datetime | None) -> Observation:
    return Observation(
        instance_id=instance_id,
        generation=1,
        epoch=1,
        status=status,
        observed_at=START,
        started_at=started_at,
    )


@asynccontextmanager
async def running(node: Node) -> AsyncIterator[Node]:
    task = asyncio.ensure_future(node.stats.run())
    await asyncio.sleep(0)
    try:
        yield node
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(task, what="the service ends")


class Watching:
    """A watcher that takes samples as they come."""

    def __init__(self, node: Node, instance_id: str, interval_s: float, history_s: float = 0.0) -> None:
        self.taken: list[InstanceStats] = []
        self.task = asyncio.ensure_future(self._take(node, instance_id, interval_s, history_s))

    async def _take(self, node: Node, instance_id: str, interval_s: float, history_s: float) -> None:
        samples = node.stats.watch(instance_id, interval_s=interval_s, history_s=history_s)
        async with aclosing(samples):
            async for sample in samples:
                self.taken.append(sample)

    def spans(self) -> list[float]:
        """Seconds between the samples."""
        times = [sample.sampled_at for sample in self.taken]
        return [round((b - a) / timedelta(seconds=1), 2) for a, b in itertools.pairwise(times)]

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})


async def test_all_instances_are_read_by_one_call_a_sampling() -> None:
    async with running(Node()) as node:
        node.start("i-1", "i-2", "i-3")

        await node.clock.advance(5.0)

        assert 5 <= len(node.feed.reads) <= 7
        assert set(node.feed.reads[-1]) == {"i-1", "i-2", "i-3"}
        assert sorted(node.located) == ["i-1", "i-2", "i-3"]
        usage = node.stats.usage()
        assert (usage.running, usage.sampled, usage.pids) == (3, 3, 6)
        assert usage.cpu_used_cores == pytest.approx(3.0)


async def test_nothing_is_done_while_nothing_runs() -> None:
    async with running(Node()) as node:
        await node.clock.advance(30.0)
        node.start("i-1")
        await node.clock.advance(2.0)
        node.stop("i-1")
        before = len(node.feed.reads)
        await node.clock.advance(30.0)

        assert len(node.feed.reads) == before


async def test_a_call_gets_a_sample_that_is_at_most_100_ms_old() -> None:
    async with running(Node(interval_s=10.0)) as node:
        node.start("i-1")
        await node.clock.advance(3.0)
        made = node.samplings("i-1")

        first = await node.stats.fresh("i-1")
        again = await node.stats.fresh("i-1")
        await node.clock.advance(0.2)
        later = await node.stats.fresh("i-1")

        assert first.sampled_at == again.sampled_at
        assert later.sampled_at > first.sampled_at
        assert node.samplings("i-1") == made + 2
        assert later.cpu_used_cores == pytest.approx(1.0)


async def test_a_call_about_one_that_was_not_observed_yet_asks_its_driver() -> None:
    async with running(Node()) as node:
        node.feed.running.add("i-1")

        sample = await node.stats.fresh("i-1")
        with pytest.raises(NotFound):
            await node.stats.fresh("i-2")
        node.start("i-1")
        await node.clock.advance(2.0)

        assert sample.pids == 2
        assert node.located == ["i-1", "i-2"]


async def test_watchers_at_the_nodes_interval_or_slower_cost_no_sampling() -> None:
    async with running(Node()) as node:
        node.start("i-1")
        await node.clock.advance(2.0)
        watchers = [Watching(node, "i-1", interval_s) for interval_s in (1.0, 1.0, 2.0, 5.0)]
        await node.clock.advance(0.05)
        made = node.samplings("i-1")

        await node.clock.advance(10.0)

        assert node.samplings("i-1") - made == 10
        # A watcher's first sample is made for its call; the others are the node's own.
        assert [w.spans()[1:] for w in watchers[:3]] == [[1.0] * 9, [1.0] * 9, [2.0] * 4]
        assert watchers[3].spans()[1:] == [5.0]
        for watcher in watchers:
            await watcher.leave()


async def test_several_watchers_that_want_more_cost_one_sampling() -> None:
    async with running(Node(interval_s=10.0)) as node:
        node.start("i-1", "i-2")
        await node.clock.advance(1.0)
        watchers = [Watching(node, "i-1", 0.5) for _ in range(5)]
        await node.clock.advance(0.05)
        made, others = node.samplings("i-1"), node.samplings("i-2")

        await node.clock.advance(8.0)

        assert 15 <= node.samplings("i-1") - made <= 17
        assert node.samplings("i-2") == others
        for watcher in watchers:
            assert set(watcher.spans()) == {0.5}
            assert len(watcher.taken) >= 15
            await watcher.leave()
        after = node.samplings("i-1")
        await node.clock.advance(0.9)
        assert node.samplings("i-1") == after, "nobody wants it more often any more"


async def test_a_watch_begins_with_the_past_thinned_to_its_interval() -> None:
    async with running(Node()) as node:
        node.start("i-1")
        await node.clock.advance(20.0)

        watcher = Watching(node, "i-1", 2.0, history_s=10.0)
        await node.clock.advance(0.05)

        assert len(watcher.taken) in (5, 6)
        assert all(1.75 <= span <= 3.0 for span in watcher.spans())
        assert watcher.taken[-1].sampled_at >= node.clock.now() - timedelta(seconds=0.2)
        assert watcher.taken[0].sampled_at >= node.clock.now() - timedelta(seconds=10.1)
        await watcher.leave()


async def test_a_watch_gets_no_more_of_the_past_than_is_kept() -> None:
    async with running(Node(history=5)) as node:
        node.start("i-1")
        await node.clock.advance(60.0)

        watcher = Watching(node, "i-1", 0.1, history_s=3600.0)
        await node.clock.advance(0.05)

        assert len(watcher.taken) == 5
        await watcher.leave()


async def test_a_watch_ends_with_the_instance() -> None:
    async with running(Node()) as node:
        node.start("i-1")
        await node.clock.advance(2.0)
        watcher = Watching(node, "i-1", 1.0)
        await node.clock.advance(3.0)

        node.stop("i-1")

        await within(watcher.task, what="the watch ends")
        with pytest.raises(NotFound):
            await node.stats.fresh("i-1")


async def test_a_run_that_ended_unseen_is_noticed_and_the_next_one_followed() -> None:
    async with running(Node()) as node:
        node.start("i-1")
        await node.clock.advance(2.0)
        watcher = Watching(node, "i-1", 1.0)
        await node.clock.advance(0.05)

        node.feed.running.clear()
        await node.clock.advance(2.0)
        assert watcher.task.done()
        node.feed.running.add("i-1")
        await node.clock.advance(8.0)

        assert node.stats.usage().sampled == 1
        assert node.located == ["i-1", "i-1"]


async def test_a_new_start_begins_a_new_history() -> None:
    async with running(Node()) as node:
        node.start("i-1")
        await node.clock.advance(10.0)

        node.start("i-1")
        watcher = Watching(node, "i-1", 1.0, history_s=60.0)
        await node.clock.advance(0.1)

        assert len(watcher.taken) == 1
        assert watcher.taken[0].cpu_used_cores is None
        await watcher.leave()


async def test_one_whose_figures_cannot_be_found_is_tried_again() -> None:
    async with running(Node()) as node:
        node.locate_failure = Unavailable("the runtime is down", reason="DRIVER_UNAVAILABLE")
        node.start("i-1")
        await node.clock.advance(4.0)
        assert (node.located, node.stats.usage().sampled) == (["i-1"], 0)

        node.locate_failure = None
        await node.clock.advance(4.0)

        assert (node.located, node.stats.usage().sampled) == (["i-1", "i-1"], 1)
        assert node.stats.failures == 1


async def test_one_that_cannot_be_found_for_long_is_tried_less_and_less() -> None:
    async with running(Node()) as node:
        node.locate_failure = Unavailable("the runtime is down", reason="DRIVER_UNAVAILABLE")
        node.start("i-1")
        tries = []
        for _ in range(3):
            before = len(node.located)
            await node.clock.advance(60.0)
            tries.append(len(node.located) - before)

        node.stop("i-1")
        before = len(node.located)
        await node.clock.advance(120.0)

        assert tries == sorted(tries, reverse=True)
        assert tries[0] == 4, "at 0, 5, 15 and 35 s"
        assert tries[-1] == 1
        assert len(node.located) == before


async def test_a_feed_that_hangs_is_not_asked_again_meanwhile_and_calls_say_so() -> None:
    async with running(Node()) as node:
        node.start("i-1")
        await node.clock.advance(2.0)
        node.feed.gate.clear()

        before = len(node.feed.reads)
        await node.clock.advance(3.0)
        assert len(node.feed.reads) == before + 1
        node.feed.gate.set()
        await node.clock.advance(2.0)

        assert len(node.feed.reads) > before + 1


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(Unavailable("down", reason="DRIVER_UNAVAILABLE"), Unavailable), (RuntimeError("a defect"), Internal)],
)
async def test_a_feed_that_fails_ends_nothing(failure: Exception, expected: type[Exception]) -> None:
    async with running(Node()) as node:
        node.start("i-1")
        await node.clock.advance(2.0)
        node.feed.failure = failure
        await node.clock.advance(3.0)

        with pytest.raises(expected):
            await node.stats.fresh("i-1")
        node.feed.failure = None
        await node.clock.advance(2.0)

        assert (await node.stats.fresh("i-1")).pids == 2
        assert node.stats.failures >= 3


async def test_figures_that_make_no_sense_are_refused_and_counted() -> None:
    async with running(Node()) as node:

        async def read(instance_ids: Sequence[str]) -> Mapping[str, Mapping[str, int]]:
            return {i: {"no_such_figure": 1} for i in instance_ids}

        node.feed.read = read  # type: ignore[method-assign]
        node.start("i-1")
        await node.clock.advance(3.0)

        with pytest.raises(FailedPrecondition):
            await node.stats.fresh("i-1")
        assert node.stats.failures >= 2


async def test_heartbeats_carry_all_or_take_turns() -> None:
    async with running(Node()) as node:
        ids = [f"i-{n}" for n in range(5)]
        node.start(*ids)
        await until_sampled(node, 5)

        assert set(node.stats.newest(limit=5)) == set(ids)
        told = [set(node.stats.newest(limit=2)) for _ in range(5)]

        assert all(len(each) == 2 for each in told)
        assert set.union(*told[:3]) == set(ids)


async def until_sampled(node: Node, count: int) -> None:
    await node.clock.advance(2.0)
    await until(lambda: node.stats.usage().sampled == count, what="all are sampled")
