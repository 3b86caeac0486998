"""Containment of driver faults: whatever a driver does, its caller gets an answer or an error of core.errors in time.

An exception outside the tree becomes Internal and is logged with its traceback. A call that hangs ends with
DeadlineExceeded (``DRIVER_TIMEOUT``): it is cancelled, and left behind when it does not even react to that.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from hypervisor.agent.drivers.driver import Assignment, Console, Driver, Handle
from hypervisor.agent.drivers.powers import Collecting, Pausing, Snapshotting, Suspending, Updating
from hypervisor.agent.stats.sources import StatsSource
from hypervisor.core.errors import DeadlineExceeded, HypervisorError, Internal, Unimplemented
from hypervisor.core.machines import Snapshot, SnapshotKind
from hypervisor.core.model import DriverInfo, Observation, Sizes

__all__ = ["DriverDeadlines", "GuardedDriver"]

T = TypeVar("T")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DriverDeadlines:
    """How long a driver may take, in seconds. A stop has its grace on top of ``action_s``."""

    create_s: float = 300.0
    """Image import and unpacking included; likewise for what moves a whole memory or disk."""
    action_s: float = 60.0
    query_s: float = 10.0
    abandon_s: float = 2.0
    """How long a cancelled call may take to end."""


class GuardedDriver:
    """A Driver around a driver. ``attach`` guards the attaching; the console itself is the hub's to contain."""

    def __init__(self, inner: Driver, *, deadlines: DriverDeadlines) -> None:
        self._inner = inner
        self._deadlines = deadlines
        self._left_behind: set[asyncio.Task[Any]] = set()
        self.name = inner.name

    async def create(self, assignment: Assignment) -> Handle:
        return await self._call("create", self._inner.create(assignment), self._deadlines.create_s)

    async def start(self, instance_id: str) -> Observation:
        return await self._call("start", self._inner.start(instance_id), self._deadlines.action_s)

    async def stop(self, instance_id: str, *, grace_s: float) -> Observation:
        work = self._inner.stop(instance_id, grace_s=grace_s)
        return await self._call("stop", work, grace_s + self._deadlines.action_s)

    async def restart(self, instance_id: str, *, grace_s: float) -> Observation:
        work = self._inner.restart(instance_id, grace_s=grace_s)
        return await self._call("restart", work, grace_s + 2 * self._deadlines.action_s)

    async def delete(self, instance_id: str) -> bool:
        return await self._call("delete", self._inner.delete(instance_id), self._deadlines.action_s)

    async def get(self, instance_id: str) -> Observation:
        return await self._call("get", self._inner.get(instance_id), self._deadlines.query_s)

    async def list(self) -> tuple[Observation, ...]:
        return await self._call("list", self._inner.list(), self._deadlines.query_s)

    async def stats_source(self, instance_id: str) -> StatsSource:
        return await self._call("stats", self._inner.stats_source(instance_id), self._deadlines.query_s)

    async def attach(self, instance_id: str) -> Console:
        return await self._call("attach", self._inner.attach(instance_id), self._deadlines.query_s)

    async def recover(self, instance_id: str, handle: Handle) -> Observation | None:
        return await self._call("recover", self._inner.recover(instance_id, handle), self._deadlines.action_s)

    async def update(self, instance_id: str, sizes: Sizes) -> Observation:
        return await self._call(
            "update", self._updating().update(instance_id, sizes), self._deadlines.action_s
        )

    async def pause(self, instance_id: str) -> Observation:
        inner = self._pausing()
        return await self._call("pause", inner.pause(instance_id), self._deadlines.action_s)

    async def resume(self, instance_id: str) -> Observation:
        inner = self._pausing()
        return await self._call("resume", inner.resume(instance_id), self._deadlines.action_s)

    async def suspend(self, instance_id: str) -> Observation:
        inner = self._suspending()
        return await self._call("suspend", inner.suspend(instance_id), self._deadlines.create_s)

    async def create_snapshot(self, instance_id: str, name: str, *, kind: SnapshotKind) -> Snapshot:
        work = self._snapshotting().create_snapshot(instance_id, name, kind=kind)
        return await self._call("create_snapshot", work, self._deadlines.create_s)

    async def list_snapshots(self, instance_id: str) -> tuple[Snapshot, ...]:
        work = self._snapshotting().list_snapshots(instance_id)
        return await self._call("list_snapshots", work, self._deadlines.query_s)

    async def restore_snapshot(self, instance_id: str, name: str) -> Observation:
        work = self._snapshotting().restore_snapshot(instance_id, name)
        return await self._call("restore_snapshot", work, self._deadlines.create_s)

    async def delete_snapshot(self, instance_id: str, name: str) -> bool:
        work = self._snapshotting().delete_snapshot(instance_id, name)
        return await self._call("delete_snapshot", work, self._deadlines.action_s)

    async def collect(self) -> None:
        if isinstance(self._inner, Collecting):
            await self._call("collect", self._inner.collect(), self._deadlines.action_s)

    def events(self) -> AsyncIterator[Observation]:
        """The inner driver's events, unguarded: their consumer is a task root and contains faults itself."""
        return self._inner.events()

    async def info(self) -> DriverInfo:
        return await self._call("info", self._inner.info(), self._deadlines.query_s)

    async def aclose(self) -> None:
        await self._call("aclose", self._inner.aclose(), self._deadlines.query_s)

    # Whether the driver says in its capabilities that it has a power was looked at before; here a driver is caught that
    # says so and has not.

    def _updating(self) -> Updating:
        if not isinstance(self._inner, Updating):
            raise self._lacks("update")
        return self._inner

    def _pausing(self) -> Pausing:
        if not isinstance(self._inner, Pausing):
            raise self._lacks("pause")
        return self._inner

    def _suspending(self) -> Suspending:
        if not isinstance(self._inner, Suspending):
            raise self._lacks("suspend")
        return self._inner

    def _snapshotting(self) -> Snapshotting:
        if not isinstance(self._inner, Snapshotting):
            raise self._lacks("snapshot")
        return self._inner

    def _lacks(self, verb: str) -> Unimplemented:
        return Unimplemented(
            f"driver {self.name} cannot {verb}",
            reason="CAPABILITY_MISSING",
            metadata={"driver": self.name, "verb": verb},
        )

    async def _call(self, verb: str, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        task = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait({task}, timeout=timeout_s)
            if not done:
                task.cancel()
                await asyncio.wait({task}, timeout=self._deadlines.abandon_s)
        finally:
            if not task.done():
                task.cancel()
                self._left_behind.add(task)
                task.add_done_callback(self._forget)
        if not task.done() or (not done and (task.cancelled() or task.exception() is not None)):
            _log.error("driver_timeout", driver=self.name, verb=verb, timeout_s=timeout_s)
            raise DeadlineExceeded(
                f"driver {self.name} did not finish {verb} within {timeout_s:g} s: look at its runtime on the node",
                reason="DRIVER_TIMEOUT",
                metadata={"driver": self.name, "verb": verb},
            )
        return self._outcome(verb, task)

    def _outcome(self, verb: str, task: "asyncio.Future[T]") -> T:
        if task.cancelled():
            raise Internal(f"driver {self.name} cancelled its own {verb}", metadata={"driver": self.name})
        failure = task.exception()
        if failure is None:
            return task.result()
        if isinstance(failure, HypervisorError):
            raise failure
        if not isinstance(failure, Exception):
            raise failure
        _log.error("driver_defect", driver=self.name, verb=verb, exc_info=failure)
        raise Internal(
            f"driver {self.name} failed in {verb}: {failure}",
            reason="DRIVER_DEFECT",
            metadata={"driver": self.name, "verb": verb},
        ) from failure

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._left_behind.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.warning("abandoned_driver_call_failed", driver=self.name, error=repr(task.exception()))
