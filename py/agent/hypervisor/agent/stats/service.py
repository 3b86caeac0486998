"""The node's statistics: one sampling of all running instances at an interval, from which everybody is served.

- What runs is told by :meth:`StatsService.observed` and :meth:`StatsService.deleted`; where its figures are is asked of
  the driver once a run. One whose figures cannot be found is tried again.
- All control groups are read by one call in a thread of its own (the sampler lets go of the GIL); what comes from feeds
  is read by one call a feed, beside it. A feed that hangs holds up nobody.
- A call for one instance gets the newest sample, or a fresh one when that is older than 100 ms. Watchers are served
  from the history; one who wants samples more often than they are made has that instance sampled more often, once for
  all who do.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import structlog

from hypervisor.agent.stats.finding import Finder
from hypervisor.agent.stats.followed import Followed
from hypervisor.agent.stats.records import USAGE_FIELDS, stats_of, thinned, usage_of
from hypervisor.agent.stats.sources import StatsFeed, StatsSource
from hypervisor.core.clock import Clock
from hypervisor.core.errors import DeadlineExceeded, FailedPrecondition, HypervisorError, Internal
from hypervisor.core.model import InstanceStats, InstancesUsage, Observation
from hypervisor.core.states import InstanceStatus
from hypervisor.ext.stats_sampler import Record, Sampler, Sources

__all__ = ["FRESH_S", "StatsService"]

FRESH_S = 0.1
"""A sample that old at most is the answer to a call for a fresh one; also the shortest interval of a watch."""

_FEED_TIMEOUT_S = 5.0
_SELDOM_S = 60.0
_FILES_OF_ONE = 16
"""At most so many files are opened for one instance."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RUNS = frozenset({InstanceStatus.RUNNING, InstanceStatus.PAUSED})
_LEAVING = frozenset({InstanceStatus.STOPPING, InstanceStatus.DELETING})
"""Still there for now: followed as long as there is something to read."""

_log = structlog.get_logger(__name__)


class StatsService:
    """See the module's docstring. ``locate`` asks the driver of an instance where its figures are; it raises
    HypervisorError. ``max_open_files``: instances beyond it are not measured. :meth:`run` must be running."""

    def __init__(
        self,
        *,
        locate: Callable[[str], Awaitable[StatsSource]],
        clock: Clock,
        interval_s: float,
        slow_interval_s: float,
        history: int,
        max_open_files: int = 100_000,
    ) -> None:
        self._locate = locate
        self._clock = clock
        self._interval_s = interval_s
        self._max_open_files = max_open_files
        self._sampler = Sampler(history=history, slow_period_ns=round(slow_interval_s * 1e9))
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stats")
        self._running: dict[str, datetime | None] = {}
        """Start of the run by the id of each instance that runs, as seen last."""
        self._followed: dict[str, Followed] = {}
        self._turns: dict[str, None] = {}
        """Ids in the order in which heartbeats carry them."""
        self._finder = Finder(self._attach, clock=clock, failed=self._not_found)
        self._feeds_read: set[StatsFeed] = set()
        self._group: asyncio.TaskGroup | None = None
        self._wake_sampler = asyncio.Event()
        self._logged_at: dict[str, float] = {}
        self.samples = 0
        """Samples made since the start."""
        self.failures = 0
        """Times that figures of an instance could not be found or read."""
        self.sampling_s = 0.0
        """How long sampling took altogether."""

    # -- what runs ---------------------------------------------------------------------------------------------

    def observed(self, seen: Observation) -> None:
        """Follow it while it runs. Does not block."""
        instance_id = seen.instance_id
        if seen.status in _LEAVING:
            return
        if seen.status not in _RUNS:
            self.deleted(instance_id)
            return
        known = self._followed.get(instance_id)
        if known is not None and known.started_at is None:
            known.started_at = seen.started_at  # Followed for a call that came before this was observed.
        elif known is not None and known.started_at != seen.started_at:
            self._detach(known)
            known = None
        self._running[instance_id] = seen.started_at
        if known is None:
            self._finder.want(instance_id)

    def deleted(self, instance_id: str) -> None:
        """It does not run any more. Does not block; its files are closed when this returns."""
        self._running.pop(instance_id, None)
        self._finder.forget(instance_id)
        known = self._followed.get(instance_id)
        if known is not None:
            self._detach(known)

    # -- what others ask for -----------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Instances that run."""
        return len(self._running)

    @property
    def open_files(self) -> int:
        """Files kept open."""
        return self._sampler.open_files()

    async def fresh(self, instance_id: str) -> InstanceStats:
        """A sample that is at most 100 ms old. FailedPrecondition (``NOT_RUNNING``), and what ``locate`` raises."""
        _, record = await self._fresh(instance_id)
        return stats_of(record)

    async def watch(
        self, instance_id: str, *, interval_s: float, history_s: float = 0.0
    ) -> AsyncGenerator[InstanceStats, None]:
        """Samples about ``interval_s`` apart until the instance ends; first those of the last ``history_s`` seconds.

        Who takes them slowly gets those that were made meanwhile, as far back as the history goes. Raises as
        :meth:`fresh`, before the first sample only.
        """
        followed, record = await self._fresh(instance_id)
        followed.join(interval_s)
        self._adjust(followed)
        try:
            first = [record]
            if history_s > 0:
                since = max(record.monotonic_ns - round(history_s * 1e9), 0)
                first = thinned(
                    self._sampler.history(followed.slot, since_monotonic_ns=since), apart_s=interval_s
                )
            for record in first:
                yield stats_of(record)
            # A sampling comes when its turn is: the nearest one to when a sample is due is taken.
            slack_ns = round(min(interval_s, self._interval_s) * 0.5e9)
            interval_ns = round(interval_s * 1e9)
            due = record.monotonic_ns + interval_ns
            while not followed.ended:
                await followed.news()
                if followed.ended:
                    return
                missed = self._sampler.history(followed.slot, after_sequence=record.sequence)
                for record in missed:
                    if record.monotonic_ns >= due - slack_ns:
                        due = max(due, record.monotonic_ns - slack_ns) + interval_ns
                        yield stats_of(record)
                        if followed.ended:
                            return
        finally:
            followed.leave(interval_s)
            self._adjust(followed)

    def usage(self) -> InstancesUsage:
        """What all instances use together, by their newest samples."""
        return usage_of(
            self._sampler.totals(USAGE_FIELDS),
            running=len(self._running),
            sampled=sum(followed.sampled for followed in self._followed.values()),
        )

    def newest(self, *, limit: int) -> dict[str, InstanceStats]:
        """Newest samples by instance id, at most ``limit``: those whose turn was longest ago, if there are more."""
        chosen = list(itertools.islice(self._turns, limit))
        if len(chosen) < len(self._turns):
            for instance_id in chosen:
                del self._turns[instance_id]
                self._turns[instance_id] = None
        found = {}
        for instance_id, record in self.records(chosen):
            found[instance_id] = stats_of(record)
        return found

    def records(
        self, instance_ids: Iterable[str] | None = None, *, limit: int | None = None
    ) -> list[tuple[str, Record]]:
        """Newest records of these instances, or of the ``limit`` followed longest (None: of all); those that have none
        are left out."""
        found = []
        for instance_id in itertools.islice(self._followed, limit) if instance_ids is None else instance_ids:
            followed = self._followed.get(instance_id)
            record = None if followed is None else self._sampler.latest(followed.slot)
            if record is not None:
                found.append((instance_id, record))
        return found

    # -- running -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Sample for ever."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self._finder.run(group))
                await self._sample_for_ever(group)
        finally:
            self._group = None
            for followed in tuple(self._followed.values()):
                self._detach(followed)
            # A sampling in progress ends within milliseconds; the files are closed after it.
            self._threads.shutdown(wait=True)
            self._sampler.close()

    async def _sample_for_ever(self, group: asyncio.TaskGroup) -> None:
        due = self._clock.monotonic()
        while True:
            if not self._running and not self._followed:
                self._wake_sampler.clear()
                await self._wake_sampler.wait()
                due = self._clock.monotonic()
            started = self._clock.monotonic()
            await self._sample_all(group)
            self._finder.look()
            ended = self._clock.monotonic()
            self.sampling_s += ended - started
            if ended - started > self._interval_s:
                self._warn_seldom(
                    "stats_interval_too_short",
                    took_s=round(ended - started, 3),
                    interval_s=self._interval_s,
                    instances=len(self._followed),
                )
            due = max(due + self._interval_s, ended)
            await self._clock.sleep(due - ended)

    async def _sample_all(self, group: asyncio.TaskGroup) -> None:
        feeds: dict[StatsFeed, list[str]] = {}
        for followed in self._followed.values():
            if followed.feed is not None:
                feeds.setdefault(followed.feed, []).append(followed.instance_id)
        for feed, instance_ids in feeds.items():
            if feed not in self._feeds_read:
                self._feeds_read.add(feed)
                group.create_task(self._read_feed(feed, instance_ids))
        if self._sampler.open_files():
            self.samples += await asyncio.get_running_loop().run_in_executor(
                self._threads, self._sampler.sample_all, *self._now()
            )
            gone = set(self._sampler.gone())
            for followed in tuple(self._followed.values()) if gone else ():
                if followed.slot in gone:
                    self._lost(followed)
        for followed in self._followed.values():
            if followed.watched and followed.feed is None:
                followed.tell()

    async def _read_feed(self, feed: StatsFeed, instance_ids: list[str]) -> None:
        try:
            await self._store_from(feed, instance_ids)
        except HypervisorError as exc:
            self.failures += 1
            _log.debug("stats_feed_failed", reason=exc.reason, error=exc.message)
        finally:
            self._feeds_read.discard(feed)

    async def _store_from(self, feed: StatsFeed, instance_ids: list[str]) -> None:
        """Read a feed and store what it says. HypervisorError when it cannot be read."""
        asked = {i: followed.slot for i in instance_ids if (followed := self._followed.get(i)) is not None}
        try:
            async with asyncio.timeout(_FEED_TIMEOUT_S):
                figures = await feed.read(instance_ids)
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"the runtime did not tell what its instances use within {_FEED_TIMEOUT_S:g} s",
                reason="DRIVER_TIMEOUT",
            ) from exc
        except HypervisorError:
            raise
        except Exception as exc:
            # A plug-in boundary: what one driver does wrongly must not end the others' statistics.
            _log.exception("stats_feed_defect")
            raise Internal(f"a driver failed to tell what its instances use: {exc}") from exc
        monotonic_ns, wall_ns = self._now()
        for instance_id, slot in asked.items():
            followed = self._followed.get(instance_id)
            if followed is None or followed.slot != slot:
                continue  # It ended, or began again, while the runtime was asked.
            values = figures.get(instance_id)
            if values is None:
                self._lost(followed)
                continue
            try:
                self._sampler.store(slot, monotonic_ns, wall_ns, values)
            except (ValueError, TypeError) as exc:
                self.failures += 1
                _log.error("stats_feed_defect", instance=instance_id, error=str(exc))
                continue
            self.samples += 1
            followed.sampled = True
            followed.tell()

    async def _fresh(self, instance_id: str) -> tuple[Followed, Record]:
        followed = self._followed.get(instance_id)
        if followed is None:
            followed = await self._finder.find(instance_id)
        record = self._sampler.latest(followed.slot)
        if record is None or self._now()[0] - record.monotonic_ns > FRESH_S * 1e9:
            await self._sample_one(followed)
            record = None if followed.ended else self._sampler.latest(followed.slot)
        if record is None:
            raise _not_running(instance_id)
        return followed, record

    async def _sample_one(self, followed: Followed) -> None:
        if followed.feed is not None:
            await self._store_from(followed.feed, [followed.instance_id])
        elif self._sampler.sample(followed.slot, *self._now()):
            self.samples += 1
            followed.tell()
        else:
            self._lost(followed)

    def _adjust(self, followed: Followed) -> None:
        """Sample one that is watched more often than the others by itself, or no more."""
        wanted_s = followed.wanted_s()
        if followed.fast is not None:
            followed.fast.cancel()
            followed.fast = None
        if wanted_s is not None and wanted_s < self._interval_s and not followed.ended and self._group:
            followed.fast = self._group.create_task(self._sample_often(followed, wanted_s))

    async def _sample_often(self, followed: Followed, interval_s: float) -> None:
        due = self._clock.monotonic()
        while not followed.ended:
            due = max(due + interval_s, self._clock.monotonic())
            await self._clock.sleep(due - self._clock.monotonic())
            if followed.ended:
                return
            newest = self._sampler.latest(followed.slot)
            if newest is not None and self._now()[0] - newest.monotonic_ns < interval_s * 0.5e9:
                continue  # A call or the sampling of all was here just now.
            try:
                await self._sample_one(followed)
            except HypervisorError as exc:
                self.failures += 1
                _log.debug("stats_not_sampled", instance=followed.instance_id, reason=exc.reason)

    # -- following ---------------------------------------------------------------------------------------------

    async def _attach(self, instance_id: str) -> Followed:
        """Follow it, if it is not followed. Raises HypervisorError."""
        known = self._followed.get(instance_id)
        if known is not None:
            return known
        started_at = self._running.get(instance_id)
        return self._follow(instance_id, await self._locate(instance_id), started_at)

    def _not_found(self, instance_id: str, _: HypervisorError) -> None:
        self.failures += 1
        if instance_id in self._running:
            self._finder.want_later(instance_id)
            self._wake_sampler.set()

    def _follow(self, instance_id: str, source: StatsSource, started_at: datetime | None) -> Followed:
        feed = None if isinstance(source, Sources) else source
        if feed is None and self._sampler.open_files() + _FILES_OF_ONE > self._max_open_files:
            # The rest of what the agent may open is for its calls, consoles and journal: those must not fail.
            self._warn_seldom(
                "stats_open_files_exhausted", instances=len(self._followed), limit=self._max_open_files
            )
            raise FailedPrecondition(
                f"what {instance_id} uses is not measured: the agent keeps {self._max_open_files} files open for other "
                "instances; raise its limit of open files (LimitNOFILE)",
                reason="STATS_UNREADABLE",
                metadata={"instance": instance_id},
            )
        try:
            slot = self._sampler.add(source if isinstance(source, Sources) else None)
        except FileNotFoundError as exc:
            raise _not_running(instance_id) from exc
        except OSError as exc:
            self._warn_seldom("stats_files_not_opened", instance=instance_id, error=str(exc))
            raise FailedPrecondition(
                f"the control group of {instance_id} cannot be read: {exc}",
                reason="STATS_UNREADABLE",
                metadata={"instance": instance_id},
            ) from exc
        followed = Followed(instance_id, slot=slot, feed=feed, started_at=started_at)
        self._followed[instance_id] = followed
        self._turns[instance_id] = None
        self._wake_sampler.set()
        if feed is None:
            # At once: what rates are reckoned from, and an end that came meanwhile is noticed.
            if not self._sampler.sample(slot, *self._now()):
                self._lost(followed)
                raise _not_running(instance_id)
            followed.sampled = True
            self.samples += 1
        return followed

    def _lost(self, followed: Followed) -> None:
        """There is nothing to read any more: it ended, and what it is now will be observed; or it began again."""
        self._detach(followed)
        if followed.instance_id in self._running:
            self._finder.want_later(followed.instance_id)

    def _detach(self, followed: Followed) -> None:
        if followed.ended:
            return
        followed.ended = True
        del self._followed[followed.instance_id]
        self._turns.pop(followed.instance_id, None)
        self._sampler.remove(followed.slot)
        if followed.fast is not None and followed.fast is not asyncio.current_task():
            followed.fast.cancel()
        followed.tell()

    def _warn_seldom(self, event: str, **values: object) -> None:
        """Log a warning that concerns many instances once a minute at most."""
        now = self._clock.monotonic()
        if now - self._logged_at.get(event, float("-inf")) >= _SELDOM_S:
            self._logged_at[event] = now
            _log.warning(event, **values)

    def _now(self) -> tuple[int, int]:
        """Monotonic and wall clock in nanoseconds."""
        wall = (self._clock.now() - _EPOCH) // timedelta(microseconds=1) * 1000
        return round(self._clock.monotonic() * 1e9), wall


def _not_running(instance_id: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"instance {instance_id} does not run: start it first",
        reason="NOT_RUNNING",
        metadata={"instance": instance_id},
    )
