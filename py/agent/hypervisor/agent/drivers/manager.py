"""The manager: owns the node's instances and every rule about them, over any driver.

- One action on an instance at a time, in the order of the calls; different instances concurrently.
- Idempotent by id, generation and epoch; stale epochs are refused, a newer epoch replaces the old copy.
- Capabilities are looked at before a driver is asked.
- An action that was begun goes on when its caller leaves; what comes of it is then reported instead of answered.

How an action is done is in actions.py, what happens after a restart in recovery.py.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from hypervisor.agent.drivers.actions import Actions, lost
from hypervisor.agent.drivers.driver import Assignment, Console
from hypervisor.agent.drivers.guard import GuardedDriver
from hypervisor.agent.drivers.health import DriverHealth
from hypervisor.agent.drivers.instances import InstanceRef, LocalInstances, Slot
from hypervisor.agent.drivers.recovery import Recovery
from hypervisor.agent.drivers.restarting import Restarter
from hypervisor.agent.entries import Entry, Phase
from hypervisor.agent.fencing.gate import Gate, OpenGate
from hypervisor.agent.images.providing import ImageProvider
from hypervisor.agent.stats.sources import StatsSource
from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, Internal, NotFound, Unavailable
from hypervisor.core.machines import Snapshot, SnapshotKind
from hypervisor.core.model import Observation, Sizes
from hypervisor.core.retry import Backoff
from hypervisor.core.states import ACTIVE, InstanceStatus

__all__ = ["Manager"]

T = TypeVar("T")

_SETTLE_EVERY_S = 15.0
_REFRESH_EVERY_S = 60.0
_EVENTS_BACKOFF = Backoff(initial_s=0.2, maximum_s=5.0)

_log = structlog.get_logger(__name__)


class Manager:
    """See the module's docstring. :meth:`run` must be running; calls before :meth:`ready` returns are refused."""

    def __init__(
        self,
        *,
        instances: LocalInstances,
        drivers: DriverHealth,
        clock: Clock,
        rng: random.Random,
        images: ImageProvider | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._instances = instances
        self._drivers = drivers
        self._clock = clock
        self._rng = rng
        self._gate: Gate = gate or OpenGate()
        self._actions = Actions(instances=instances, drivers=drivers, images=images, gate=self._gate)
        self._recovery = Recovery(instances=instances, drivers=drivers, actions=self._actions)
        self._restarter = Restarter(instances=instances, drivers=drivers, actions=self._actions, clock=clock)
        self._told: set[str] = set()
        """Drivers that have told all they have since the agent's start."""
        self._group: asyncio.TaskGroup | None = None
        self._ready = asyncio.Event()
        self._wake_settler = asyncio.Event()
        drivers.on_change(lambda _name: self._wake_settler.set())

    async def run(self) -> None:
        """Adopt what is there, then consume the drivers' events for ever."""
        await self._drivers.check_all()
        try:
            async with asyncio.TaskGroup() as group:
                self._restarter.group = group
                for name in self._drivers.names:
                    if self._drivers.available(name):
                        await self._adopt(name)
                self._group = group
                for name in self._drivers.names:
                    group.create_task(self._consume_events(self._drivers.named(name)))
                group.create_task(self._settle_for_ever(group))
                self._ready.set()
        finally:
            self._group = self._restarter.group = None
            self._ready.clear()

    async def ready(self) -> None:
        """Return once everything that can be adopted is adopted."""
        await self._ready.wait()

    async def create(self, assignment: Assignment, *, start: bool) -> Observation:
        """Make an instance and, with ``start``, start it. A repeat finds it made."""
        ref = InstanceRef(assignment.instance_id, assignment.generation, assignment.epoch)
        self._abandon(ref, older_than=ref.epoch)

        async def work(slot: Slot) -> Observation:
            self._instances.refuse_stale(slot, ref)
            if slot.entry is not None and ref.epoch > slot.entry.epoch:
                _log.info("instance_superseded", instance=ref.instance_id, epoch=ref.epoch)
                await self._actions.delete(slot, slot.entry, grace_s=0.0)
            if slot.entry is not None and slot.entry.phase is not Phase.READY:
                self._actions.renew_sources(slot, assignment)
                await self._actions.settle(slot)
            if slot.entry is not None:
                return await self._create_again(slot, assignment, start=start)
            self._instances.refuse_deleted(slot, ref)
            driver = await self._drivers.choose(assignment.type)
            self._drivers.require(driver.name, "create")
            if start:
                self._drivers.require(driver.name, "start")
            return await self._actions.create(slot, assignment, driver=driver, start=start)

        return await self._act(ref.instance_id, work)

    async def start(self, ref: InstanceRef) -> Observation:
        """Start it; one that runs is left alone."""

        async def work(slot: Slot) -> Observation:
            entry = await self._settled(slot, ref, "start")
            return await self._actions.start(slot, entry)

        return await self._act(ref.instance_id, work)

    async def stop(self, ref: InstanceRef, *, grace_s: float) -> Observation:
        """Stop it, by force after ``grace_s`` seconds; one that does not run is left alone."""

        async def work(slot: Slot) -> Observation:
            entry = await self._settled(slot, ref, "stop")
            return await self._actions.stop(slot, entry, grace_s=grace_s)

        return await self._act(ref.instance_id, work)

    async def restart(self, ref: InstanceRef, *, grace_s: float) -> Observation:
        """Stop and start it."""

        async def work(slot: Slot) -> Observation:
            entry = await self._settled(slot, ref, "restart")
            return await self._actions.restart(slot, entry, grace_s=grace_s)

        return await self._act(ref.instance_id, work)

    async def delete(self, ref: InstanceRef, *, grace_s: float) -> bool:
        """Remove it and all it used, with up to ``grace_s`` seconds for a polite end; whether there was anything."""
        self._abandon(ref, older_than=ref.epoch + 1)

        async def work(slot: Slot) -> bool:
            self._instances.refuse_stale(slot, ref)
            if slot.entry is None:
                await self._instances.forget_unseen(ref)
                return await self._delete_unknown(slot)
            self._drivers.require(slot.entry.driver, "delete")
            await self._actions.delete(slot, slot.entry, grace_s=grace_s)
            return True

        return await self._act(ref.instance_id, work)

    async def fence(self, instance_id: str, *, why: str) -> None:
        """Stop an instance by force, because it must not run here now; nothing where the gate is open again."""

        async def work(slot: Slot) -> None:
            if slot.entry is not None and self._gate.closed:
                await self._actions.fence(slot, slot.entry, why=why)

        await self._act(instance_id, work)

    async def update(self, ref: InstanceRef, sizes: Sizes) -> Observation:
        """Give it more or less of the node."""
        return await self._ask(ref, "update", lambda driver: driver.update(ref.instance_id, sizes))

    async def pause(self, ref: InstanceRef) -> Observation:
        """Freeze it; one that is paused is left alone."""
        return await self._ask(ref, "pause", lambda driver: driver.pause(ref.instance_id))

    async def resume(self, ref: InstanceRef) -> Observation:
        """Let it go on; one that runs is left alone."""
        return await self._ask(ref, "pause", lambda driver: driver.resume(ref.instance_id))

    async def suspend(self, ref: InstanceRef) -> Observation:
        """Put its memory on disk and end it; one that is suspended is left alone."""
        return await self._ask(
            ref, "suspend", lambda driver: driver.suspend(ref.instance_id), runs=lambda _seen: False
        )

    async def create_snapshot(self, ref: InstanceRef, name: str, *, kind: SnapshotKind) -> Observation:
        """Keep its present state; one that is kept under that name is left alone."""
        verb = "snapshot-diff" if kind is SnapshotKind.DIFF else "snapshot"
        return await self._ask(
            ref, verb, lambda driver: driver.create_snapshot(ref.instance_id, name, kind=kind)
        )

    async def list_snapshots(self, ref: InstanceRef) -> tuple[Snapshot, ...]:
        """What is kept of it, oldest first."""
        self._need_ready()
        entry = self._entry_of(ref.instance_id)
        self._drivers.require(entry.driver, "snapshot")
        return await self._drivers.named(entry.driver).list_snapshots(ref.instance_id)

    async def restore_snapshot(self, ref: InstanceRef, name: str) -> Observation:
        """Go back to what was kept."""
        return await self._ask(
            ref,
            "snapshot",
            lambda driver: driver.restore_snapshot(ref.instance_id, name),
            runs=lambda seen: seen.status in ACTIVE,
        )

    async def delete_snapshot(self, ref: InstanceRef, name: str) -> Observation:
        """Forget what was kept; one that is not there is no error."""
        return await self._ask(ref, "snapshot", lambda driver: driver.delete_snapshot(ref.instance_id, name))

    async def list(self) -> tuple[Observation, ...]:
        """Everything of this node, asked of the drivers; where one does not answer, as it was seen last."""
        self._need_ready()
        await self._refresh_all(answered=True)
        return self.last_seen()

    def last_seen(self) -> tuple[Observation, ...]:
        """Everything of this node as it was seen last, without asking."""
        return self._instances.last_seen()

    def for_registration(self) -> tuple[Observation, ...]:
        """The same, as new observations: the server may have lost sight of the node."""
        return self._instances.see_again()

    async def stats_source(self, instance_id: str) -> StatsSource:
        """Where the instance's figures are; for the statistics service only. NotFound, FailedPrecondition
        (``NOT_RUNNING``)."""
        entry = self._entry_of(instance_id)
        self._drivers.require(entry.driver, "stats")
        return await self._drivers.named(entry.driver).stats_source(instance_id)

    def described(self, instance_id: str) -> Entry | None:
        """What the node knows of an instance; None for one that is not here."""
        slot = self._instances.find(instance_id)
        return None if slot is None else slot.entry

    async def attach(self, instance_id: str) -> Console:
        """The driver's one console of the instance; for the console hubs only."""
        entry = self._entry_of(instance_id)
        self._drivers.require(entry.driver, "console")
        return await self._drivers.named(entry.driver).attach(instance_id)

    async def look(self, instance_id: str) -> Observation:
        """The instance as it was seen last; asked of its driver when nothing was. NotFound."""
        entry = self._entry_of(instance_id)
        seen = self._instances.book.newest(instance_id)
        return seen if seen is not None else await self._drivers.named(entry.driver).get(instance_id)

    def known(self) -> frozenset[str]:
        """Ids of all instances of the node, seen or not."""
        return frozenset(slot.instance_id for slot in self._instances.slots() if slot.entry is not None)

    # -- the rules ---------------------------------------------------------------------------------------------

    async def _ask(
        self,
        ref: InstanceRef,
        verb: str,
        ask: Callable[[GuardedDriver], Awaitable[object]],
        *,
        runs: Callable[[Observation], bool] | None = None,
    ) -> Observation:
        async def work(slot: Slot) -> Observation:
            entry = await self._settled(slot, ref, verb)
            return await self._actions.ask(slot, entry, ask, runs=runs)

        return await self._act(ref.instance_id, work)

    async def _create_again(self, slot: Slot, assignment: Assignment, *, start: bool) -> Observation:
        entry = slot.entry
        assert entry is not None
        ref = InstanceRef(assignment.instance_id, assignment.generation, assignment.epoch)
        if ref.generation != entry.generation:
            self._instances.existing(slot, ref)
        if entry.type is None:
            entry = self._actions.identify(slot, entry, assignment, start=start)
        seen = await self._actions.look(slot, entry)
        never_ran = seen.started_at is None and seen.status is not InstanceStatus.RUNNING
        if start and never_ran:
            return await self._actions.start(slot, entry)
        return seen

    async def _settled(self, slot: Slot, ref: InstanceRef, verb: str) -> Entry:
        """The entry of an instance, with what was cut off finished first."""
        entry = self._instances.existing(slot, ref)
        self._drivers.require(entry.driver, verb)
        if entry.phase is not Phase.READY:
            await self._actions.settle(slot)
            entry = self._instances.existing(slot, ref)
        return entry

    def _abandon(self, ref: InstanceRef, *, older_than: int) -> None:
        """A copy that is to go must not make the call that says so wait for its images."""
        slot = self._instances.find(ref.instance_id)
        if slot is not None and slot.entry is not None and slot.entry.epoch < older_than:
            self._actions.abandon(ref.instance_id)

    async def _delete_unknown(self, slot: Slot) -> bool:
        """Without an entry there should be nothing; the drivers that can be reached make sure."""
        existed = False
        for name in self._drivers.names:
            if not self._drivers.available(name):
                continue
            try:
                existed |= await self._drivers.named(name).delete(slot.instance_id)
            except Unavailable as exc:
                _log.info("driver_not_asked", driver=name, instance=slot.instance_id, reason=exc.reason)
        return existed

    def _entry_of(self, instance_id: str) -> Entry:
        slot = self._instances.find(instance_id)
        if slot is None or slot.entry is None or slot.entry.phase is Phase.UNDOING:
            raise NotFound(
                f"instance {instance_id} is not on this node",
                reason="INSTANCE_NOT_FOUND",
                metadata={"instance": instance_id},
            )
        return slot.entry

    async def _refresh_all(self, *, answered: bool) -> None:
        drivers = [self._drivers.named(name) for name in self._drivers.names if self._drivers.available(name)]
        await asyncio.gather(*(self._refresh(driver, answered=answered) for driver in drivers))

    async def _refresh(self, driver: GuardedDriver, *, answered: bool) -> None:
        """Compare what the driver shows with what was seen last. Actions under way and events win."""
        book = self._instances.book
        asked_at = {slot.instance_id: book.events_of(slot.instance_id) for slot in self._instances.slots()}
        try:
            found = await driver.list()
        except HypervisorError as exc:
            _log.warning("driver_list_failed", driver=driver.name, reason=exc.reason, error=exc.message)
            return
        for seen in found:
            slot = self._instances.find(seen.instance_id)
            if slot is None:
                await self._recovery.take_in(driver, seen)
                continue
            if slot.lock.locked() or slot.entry is None:
                continue
            if asked_at.get(seen.instance_id) == book.events_of(seen.instance_id):
                self._instances.record(slot, seen, answered=answered)
        listed = {seen.instance_id for seen in found}
        for slot in self._instances.slots():
            if slot.instance_id in asked_at and slot.instance_id not in listed and _is_settled(slot, driver):
                await self._look_for(driver, slot, answered=answered)

    async def _look_for(self, driver: GuardedDriver, slot: Slot, *, answered: bool) -> None:
        """One that the driver did not list: gone, if the driver says so when it is asked for it."""
        try:
            await driver.get(slot.instance_id)
        except NotFound:
            if _is_settled(slot, driver) and slot.entry is not None:
                self._instances.record(slot, lost(slot.entry, self._instances), answered=answered)
                _log.warning("instance_lost", instance=slot.instance_id, driver=driver.name)
        except HypervisorError as exc:
            _log.info("instance_not_seen", instance=slot.instance_id, reason=exc.reason)

    # -- running -----------------------------------------------------------------------------------------------

    def _need_ready(self) -> asyncio.TaskGroup:
        if self._group is None or not self._ready.is_set():
            raise Unavailable(
                "the agent is starting or stopping: try again",
                reason="AGENT_NOT_READY",
                retry_after_s=1.0,
            )
        return self._group

    async def _act(self, instance_id: str, work: Callable[[Slot], Awaitable[T]]) -> T:
        """Run ``work`` with the slot held, in a task of the manager's: the caller may leave, the work goes on."""
        group = self._need_ready()
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        group.create_task(self._perform(instance_id, work, outcome))
        try:
            return await asyncio.shield(outcome)
        except asyncio.CancelledError:
            if not outcome.cancelled():
                _log.info("caller_left", instance=instance_id)
                outcome.add_done_callback(lambda done: self._report_unanswered(instance_id, done))
            raise

    async def _perform(
        self, instance_id: str, work: Callable[[Slot], Awaitable[T]], outcome: "asyncio.Future[T]"
    ) -> None:
        try:
            async with self._instances.hold(instance_id) as slot:
                outcome.set_result(await work(slot))
        except asyncio.CancelledError:
            outcome.cancel()
            raise
        except HypervisorError as exc:
            outcome.set_exception(exc)
        except Exception as exc:
            _log.exception("manager_defect", instance=instance_id)
            outcome.set_exception(Internal(f"instance {instance_id}: {exc}"))

    def _report_unanswered(self, instance_id: str, outcome: "asyncio.Future[T]") -> None:
        if outcome.cancelled():
            return
        failure = outcome.exception()
        slot = self._instances.find(instance_id)
        if failure is not None:
            _log.warning("unanswered_action_failed", instance=instance_id, error=str(failure))
        if slot is not None:
            self._instances.announce(slot)

    async def _consume_events(self, driver: GuardedDriver) -> None:
        delays = _EVENTS_BACKOFF.delays(self._rng)
        while True:
            try:
                async for seen in driver.events():
                    delays = _EVENTS_BACKOFF.delays(self._rng)
                    slot = self._instances.find(seen.instance_id)
                    if slot is not None and slot.entry is not None and slot.entry.driver == driver.name:
                        self._instances.event(slot, seen)
                _log.error("driver_events_ended", driver=driver.name)
            except HypervisorError as exc:
                _log.warning("driver_events_lost", driver=driver.name, reason=exc.reason, error=exc.message)
            except Exception:
                _log.exception("driver_defect", driver=driver.name, verb="events")
            await self._clock.sleep(next(delays))

    async def _settle_for_ever(self, group: asyncio.TaskGroup) -> None:
        """Finish what was cut off: at the start, when a driver changes, and now and then."""
        refreshed_at = float("-inf")
        while True:
            self._wake_settler.clear()
            for name in self._drivers.names:
                if self._drivers.available(name) and (name not in self._told or self._unadopted(name)):
                    await self._adopt(name)
            for slot in self._instances.slots():
                if slot.entry is not None and slot.entry.phase is not Phase.READY and not slot.lock.locked():
                    # Not awaited: a stop may take its whole grace, and the others must not wait for it.
                    group.create_task(self._settle_one(slot.instance_id))
            if self._clock.monotonic() - refreshed_at >= _REFRESH_EVERY_S:
                # Catches what happened between adoption and the first event, and any event a driver lost.
                await self._refresh_all(answered=False)
                refreshed_at = self._clock.monotonic()
            await self._settler_pause()

    async def _settler_pause(self) -> None:
        try:
            async with asyncio.timeout(_SETTLE_EVERY_S):
                await self._wake_settler.wait()
        except TimeoutError:
            return

    async def _settle_one(self, instance_id: str) -> None:
        try:
            async with self._instances.hold(instance_id) as slot:
                await self._recovery.settle(slot)
        except Exception:
            _log.exception("manager_defect", instance=instance_id)

    async def _adopt(self, name: str) -> None:
        if await self._recovery.adopt(name):
            self._told.add(name)

    def _unadopted(self, name: str) -> bool:
        return any(
            not slot.adopted and slot.entry is not None and slot.entry.driver == name
            for slot in self._instances.slots()
        )


def _is_settled(slot: Slot, driver: GuardedDriver) -> bool:
    """Whether it is this driver's, known to be so, and nothing is done to it now."""
    entry = slot.entry
    return (
        entry is not None
        and entry.driver == driver.name
        and entry.phase is Phase.READY
        and slot.adopted
        and not slot.lock.locked()
    )
