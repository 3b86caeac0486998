"""What is done to one instance, with its slot held: journal, driver, journal, observation.

Every method brings the instance from one settled state to another or, after a crash, finishes what was begun. Rules:

- The entry that announces an action is on the disk before the driver is asked; the one that ends it follows with the
  next sync, because recovery finds out by itself whether the action took place.
- A failed create is undone; where even that fails the entry stays UNDOING and is tried again later.
- Other failed actions leave the instance as its driver then shows it: the caller decides.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import msgspec
import structlog

from hypervisor.agent.drivers.driver import Assignment, Driver, LocalImage
from hypervisor.agent.drivers.guard import GuardedDriver
from hypervisor.agent.drivers.health import DriverHealth
from hypervisor.agent.drivers.instances import LocalInstances, Slot
from hypervisor.agent.entries import Entry, Phase
from hypervisor.agent.fencing.gate import Gate, OpenGate
from hypervisor.agent.images.providing import ImageProvider, NoImages
from hypervisor.core.errors import Cancelled, DeadlineExceeded, HypervisorError, NotFound, Unavailable
from hypervisor.core.images import ImageKind
from hypervisor.core.model import Observation
from hypervisor.core.states import ACTIVE, InstanceStatus

__all__ = ["Actions", "lost", "took_place"]

_ASK_AGAIN = 5
"""How often to ask a driver anew when an event overtook its answer."""
_RUNS_AFTER = {
    Phase.STARTING: True,
    Phase.RESTARTING: True,
    Phase.STOPPING: False,
    Phase.DELETING: False,
}
"""Whether an instance is wanted to run once what its phase says is done; of a create the entry tells."""
_DOING = {
    Phase.CREATING: InstanceStatus.CREATING,
    Phase.STARTING: InstanceStatus.CREATING,
    Phase.STOPPING: InstanceStatus.STOPPING,
    Phase.RESTARTING: InstanceStatus.STOPPING,
    Phase.DELETING: InstanceStatus.DELETING,
    Phase.UNDOING: InstanceStatus.DELETING,
}

_log = structlog.get_logger(__name__)


class Actions:
    """See the module's docstring. The caller holds the slot."""

    def __init__(
        self,
        *,
        instances: LocalInstances,
        drivers: DriverHealth,
        images: ImageProvider | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._instances = instances
        self._gate: Gate = gate or OpenGate()
        self._drivers = drivers
        self._images: ImageProvider = images or NoImages()
        self._providing: dict[str, asyncio.Task[dict[str, LocalImage]]] = {}

    async def create(self, slot: Slot, assignment: Assignment, *, driver: Driver, start: bool) -> Observation:
        """Make the instance and, with ``start``, start it."""
        entry = Entry(
            instance_id=slot.instance_id,
            driver=driver.name,
            generation=assignment.generation,
            epoch=assignment.epoch,
            phase=Phase.CREATING,
            since=self._instances.clock.now(),
            assignment=assignment,
            name=assignment.name,
            project=assignment.project,
            type=assignment.type,
            start=start,
            restart=assignment.spec.restart,
            stops=assignment.spec.availability is not None and assignment.spec.availability.stops,
        )
        if entry.stops:
            self._gate.check(entry)
            await self._gate.protect(slot.instance_id)
        await self._instances.journal.put(entry)
        slot.entry = entry
        return await self._finish_create(slot, entry, driver, resumed=False)

    async def start(self, slot: Slot, entry: Entry) -> Observation:
        """Start it; one that runs is left alone."""
        self._gate.check(entry)
        driver = self._drivers.named(entry.driver)
        entry = msgspec.structs.replace(entry, ended_by="")
        return await self._change(slot, entry, Phase.STARTING, lambda: driver.start(slot.instance_id))

    async def start_again(self, slot: Slot, entry: Entry) -> Observation:
        """Start what ended by itself, as its restart policy says. Nobody waits for it: it is reported."""
        began = msgspec.structs.replace(
            entry, by_policy=True, restarts=entry.restarts.begun(self._instances.clock.now())
        )
        seen = await self.start(slot, began)
        self._instances.announce(slot)
        return seen

    async def stop(self, slot: Slot, entry: Entry, *, grace_s: float) -> Observation:
        """Stop it; one that does not run is left alone."""
        driver = self._drivers.named(entry.driver)
        return await self._change(
            slot,
            msgspec.structs.replace(entry, grace_s=grace_s),
            Phase.STOPPING,
            lambda: driver.stop(slot.instance_id, grace_s=grace_s),
        )

    async def restart(self, slot: Slot, entry: Entry, *, grace_s: float) -> Observation:
        """Stop and start it."""
        self._gate.check(entry)
        driver = self._drivers.named(entry.driver)
        return await self._change(
            slot,
            msgspec.structs.replace(entry, grace_s=grace_s, ended_by=""),
            Phase.RESTARTING,
            lambda: driver.restart(slot.instance_id, grace_s=grace_s),
        )

    async def delete(self, slot: Slot, entry: Entry, *, grace_s: float) -> bool:
        """Remove it and all it used."""
        driver = self._drivers.named(entry.driver)
        began = msgspec.structs.replace(
            entry, phase=Phase.DELETING, since=self._instances.clock.now(), grace_s=grace_s
        )
        await self._instances.journal.put(began, finishing=True)
        slot.entry = began
        before = self._begin(slot, Phase.DELETING)
        try:
            if grace_s > 0 and before is not None and before.status is InstanceStatus.RUNNING:
                await self._stop_politely(driver, slot.instance_id, grace_s)
            existed = await driver.delete(slot.instance_id)
        except HypervisorError:
            await self._give_up(slot, before)
            raise
        finally:
            slot.busy = False
        await self._images.release(slot.instance_id)
        self._instances.forget(slot)
        return existed

    async def fence(self, slot: Slot, entry: Entry, *, why: str) -> None:
        """Stop it by force, whatever was begun with it, and say why it ended."""
        slot.entry = msgspec.structs.replace(entry, ended_by=why)
        if entry.phase is Phase.READY:
            await self.stop(slot, slot.entry, grace_s=0.0)
        else:
            # What was begun is finished, or found done, once the node may run it again.
            self._instances.journal.put_soon(slot.entry)
            await self._drivers.named(entry.driver).stop(slot.instance_id, grace_s=0.0)
            self._instances.record(
                slot, await self._drivers.named(entry.driver).get(slot.instance_id), answered=True
            )
        self._instances.announce(slot)

    async def ask(
        self,
        slot: Slot,
        entry: Entry,
        ask: Callable[[GuardedDriver], Awaitable[object]],
        *,
        runs: Callable[[Observation], bool] | None = None,
    ) -> Observation:
        """Have the driver do something that needs no end of its own: whoever asked for it asks again, and finds it done
        or has it done. Returns how the instance is afterwards.

        Nothing of it is in the journal: it moves no instance between running and resting by halves that only the
        journal could tell apart. ``runs``: whether the instance is wanted to run afterwards; None: as before.
        """
        self._gate.check(entry)
        driver = self._drivers.named(entry.driver)
        asked_at = self._instances.book.events_of(slot.instance_id)
        slot.busy = slot.changing = True
        try:
            seen = await ask(driver)
            known = seen if isinstance(seen, Observation) else None
            if runs is not None and known is not None:
                self._decide(slot, runs=runs(known))
            slot.changing = False
            return await self._truth(slot, driver, known, asked_at=asked_at)
        except HypervisorError:
            slot.changing = False
            await self._give_up(slot, self._instances.book.newest(slot.instance_id))
            raise
        finally:
            slot.busy = slot.changing = False

    def identify(self, slot: Slot, entry: Entry, assignment: Assignment, *, start: bool) -> Entry:
        """Take in what an instance is that was found without a journal."""
        known = msgspec.structs.replace(
            entry,
            name=assignment.name,
            project=assignment.project,
            type=assignment.type,
            restart=assignment.spec.restart,
            runs=start,
        )
        slot.entry = known
        self._instances.journal.put_soon(known)
        return known

    async def look(self, slot: Slot, entry: Entry) -> Observation:
        """As its driver shows it now."""
        return await self._truth(slot, self._drivers.named(entry.driver), None, asked_at=-1)

    async def settle(self, slot: Slot) -> None:
        """Bring an action that a crash or a lost runtime cut off to its end; nothing for a settled instance.

        While the driver cannot be reached its error is raised, and the entry stays as it is for another try. What it
        refuses is not tried for ever: a create is undone and the error raised, a start, stop or restart given up (the
        instance is then as its driver shows it); what removes something is tried again.
        """
        entry = slot.entry
        if entry is None or entry.phase is Phase.READY:
            return
        _log.info("instance_settling", instance=slot.instance_id, phase=str(entry.phase))
        driver = self._drivers.named(entry.driver)
        match entry.phase:
            case Phase.CREATING:
                await self._finish_create(slot, entry, driver, resumed=True)
            case Phase.UNDOING:
                await self._undo(slot, entry, driver)
            case Phase.DELETING:
                await driver.delete(slot.instance_id)
                await self._images.release(slot.instance_id)
                self._instances.forget(slot)
            case Phase.STOPPING | Phase.STARTING | Phase.RESTARTING:
                try:
                    await self._finish_change(slot, entry, driver)
                except (Unavailable, DeadlineExceeded):
                    raise
                except HypervisorError as exc:
                    _log.warning(
                        "instance_settling_refused",
                        instance=slot.instance_id,
                        phase=str(entry.phase),
                        reason=exc.reason,
                        error=exc.message,
                    )
                    await self._give_up(slot, self._instances.book.newest(slot.instance_id))

    def settle_by(self, slot: Slot, seen: Observation) -> bool:
        """Settle the instance if what the driver shows proves that the action cut off took place; whether it did."""
        if slot.entry is None or not took_place(slot.entry, seen):
            return False
        self._ready(slot)
        return True

    async def _finish_create(self, slot: Slot, entry: Entry, driver: Driver, *, resumed: bool) -> Observation:
        assert entry.assignment is not None
        asked_at = self._instances.book.events_of(slot.instance_id)
        self._begin(slot, Phase.CREATING)
        try:
            images = await self._provide(entry.assignment)
            handle = await driver.create(msgspec.structs.replace(entry.assignment, images=images))
            await self._release_unpacked(slot.instance_id, images)
            seen = await driver.get(slot.instance_id) if resumed or not entry.start else None
            # A create that was cut off may have come as far as the start, and the instance may have ended since.
            if entry.start and (seen is None or seen.started_at is None):
                # Looked at again: what came before may have taken long.
                self._gate.check(entry)
                seen = await driver.start(slot.instance_id)
            slot.entry = msgspec.structs.replace(entry, handle=dict(handle))
            self._ready(slot)
            return await self._truth(slot, driver, seen, asked_at=asked_at)
        except HypervisorError as exc:
            waits = resumed and isinstance(exc, Unavailable | DeadlineExceeded)
            if slot.entry is not None and slot.entry.phase is Phase.CREATING and not waits:
                _log.info("instance_create_failed", instance=slot.instance_id, reason=exc.reason)
                await self._undo(slot, entry, driver, swallow=True)
                if slot.entry is not None:
                    raise left_behind(exc) from exc
            raise
        finally:
            slot.busy = False

    def renew_sources(self, slot: Slot, assignment: Assignment) -> None:
        """The create is asked for again: the servers that have its images may be others by now."""
        entry = slot.entry
        if entry is not None and entry.assignment is not None and entry.generation == assignment.generation:
            known = msgspec.structs.replace(entry.assignment, sources=assignment.sources)
            slot.entry = msgspec.structs.replace(entry, assignment=known)

    def abandon(self, instance_id: str) -> None:
        """Let a create that waits for its images fail now, as the instance is to be deleted."""
        waiting = self._providing.get(instance_id)
        if waiting is not None:
            waiting.cancel()

    async def _provide(self, assignment: Assignment) -> dict[str, LocalImage]:
        """The assignment's images as files. Cancelled (``CREATE_ABANDONED``) after :meth:`abandon`."""
        if not assignment.sources:
            return {}
        obtaining = asyncio.create_task(
            self._images.obtain(assignment.instance_id, assignment.sources),
            name=f"images-{assignment.instance_id}",
        )
        self._providing[assignment.instance_id] = obtaining
        try:
            await asyncio.wait({obtaining})
            if obtaining.cancelled():
                raise Cancelled(
                    f"instance {assignment.instance_id} is to be deleted: its images are not waited for",
                    reason="CREATE_ABANDONED",
                )
            return obtaining.result()
        finally:
            del self._providing[assignment.instance_id]
            if not obtaining.done():
                obtaining.cancel()
                await asyncio.wait({obtaining})

    async def _release_unpacked(self, instance_id: str, images: Mapping[str, LocalImage]) -> None:
        """Archives are of no more use once the runtime has unpacked them."""
        archives = [image.sha256 for image in images.values() if image.kind is ImageKind.OCI_ARCHIVE]
        if archives:
            await self._images.release(instance_id, digests=archives)

    async def _undo(self, slot: Slot, entry: Entry, driver: Driver, *, swallow: bool = False) -> None:
        slot.entry = msgspec.structs.replace(
            entry, phase=Phase.UNDOING, assignment=None, since=self._instances.clock.now()
        )
        self._instances.journal.put_soon(slot.entry)
        try:
            await driver.delete(slot.instance_id)
        except HypervisorError as exc:
            _log.warning(
                "instance_undo_failed", instance=slot.instance_id, reason=exc.reason, error=exc.message
            )
            if not swallow:
                raise
            return
        await self._images.release(slot.instance_id)
        # Its server may well ask for it again: who drives a create repeats it.
        self._instances.forget(slot, epoch=entry.epoch - 1)

    async def _change(
        self, slot: Slot, entry: Entry, phase: Phase, ask: Callable[[], Awaitable[Observation]]
    ) -> Observation:
        driver = self._drivers.named(entry.driver)
        began = msgspec.structs.replace(entry, phase=phase, since=self._instances.clock.now())
        await self._instances.journal.put(began)
        slot.entry = began
        asked_at = self._instances.book.events_of(slot.instance_id)
        before = self._begin(slot, phase)
        try:
            seen = await ask()
            self._ready(slot)
            return await self._truth(slot, driver, seen, asked_at=asked_at)
        except HypervisorError:
            await self._give_up(slot, before)
            raise
        finally:
            slot.busy = False

    async def _finish_change(self, slot: Slot, entry: Entry, driver: Driver) -> None:
        if entry.phase is Phase.STOPPING:
            await self._redo(slot, driver, lambda: driver.stop(slot.instance_id, grace_s=entry.grace_s))
            return
        seen = await driver.get(slot.instance_id)
        if self.settle_by(slot, seen):
            self._instances.record(slot, seen, answered=False)
            return
        self._gate.check(entry)
        if entry.phase is Phase.STARTING:
            await self._redo(slot, driver, lambda: driver.start(slot.instance_id))
        else:
            await self._redo(slot, driver, lambda: driver.restart(slot.instance_id, grace_s=entry.grace_s))

    async def _redo(self, slot: Slot, driver: Driver, ask: Callable[[], Awaitable[Observation]]) -> None:
        asked_at = self._instances.book.events_of(slot.instance_id)
        seen = await ask()
        self._ready(slot)
        await self._truth(slot, driver, seen, asked_at=asked_at)

    async def _truth(
        self, slot: Slot, driver: Driver, seen: Observation | None, *, asked_at: int
    ) -> Observation:
        """Record the driver's answer, unless an event overtook it: then ask again."""
        book = self._instances.book
        for _ in range(_ASK_AGAIN):
            if seen is not None and book.events_of(slot.instance_id) == asked_at:
                break
            asked_at = book.events_of(slot.instance_id)
            seen = await driver.get(slot.instance_id)
        assert seen is not None
        return self._instances.record(slot, seen, answered=True)

    async def _give_up(self, slot: Slot, before: Observation | None) -> None:
        """After a failed action: the entry is settled, the observation what the driver shows, if it still talks."""
        self._ready(slot, failed=True)
        entry = slot.entry
        assert entry is not None
        try:
            seen = await self._drivers.named(entry.driver).get(slot.instance_id)
        except NotFound:
            self._instances.record(slot, lost(entry, self._instances), answered=True)
        except HypervisorError as exc:
            _log.info("instance_not_seen", instance=slot.instance_id, reason=exc.reason)
            if before is not None:
                self._instances.record(slot, before, answered=True)
            else:
                self._instances.book.forget(slot.instance_id)
        else:
            self._instances.record(slot, seen, answered=True)
        # The caller gets an error and no observation; and events were held back while the action was under way.
        self._instances.announce(slot)

    async def _stop_politely(self, driver: Driver, instance_id: str, grace_s: float) -> None:
        try:
            await driver.stop(instance_id, grace_s=grace_s)
        except HypervisorError as exc:
            # The delete that follows ends it by force, or fails with the same cause.
            _log.warning("instance_stop_before_delete_failed", instance=instance_id, reason=exc.reason)

    def _begin(self, slot: Slot, phase: Phase) -> Observation | None:
        slot.busy = True
        return self._instances.mark(slot, _DOING[phase])

    def _ready(self, slot: Slot, *, failed: bool = False) -> None:
        """The action of the entry's phase has ended. ``failed``: without effect; what was wanted before still is, but
        what was to be deleted is not wanted to run."""
        entry = slot.entry
        assert entry is not None
        keeps = failed and entry.phase is not Phase.DELETING
        runs = entry.runs if keeps else _RUNS_AFTER.get(entry.phase, entry.start)
        # What somebody asked for decides about every end before it.
        asked_for = entry.phase in _RUNS_AFTER and not entry.by_policy and not failed
        slot.entry = msgspec.structs.replace(
            entry,
            phase=Phase.READY,
            assignment=None,
            start=False,
            grace_s=0.0,
            since=self._instances.clock.now(),
            runs=runs,
            by_policy=False,
            restarts=entry.restarts.cancelled() if asked_for else entry.restarts,
        )
        self._instances.journal.put_soon(slot.entry)

    def _decide(self, slot: Slot, *, runs: bool) -> None:
        """Whether it is wanted to run from now on."""
        entry = slot.entry
        assert entry is not None
        slot.entry = msgspec.structs.replace(entry, runs=runs, restarts=entry.restarts.cancelled())
        self._instances.journal.put_soon(slot.entry)


def left_behind(error: HypervisorError) -> HypervisorError:
    """The error of a create that could not be undone: something of it is on the node, whatever its reason says."""
    return type(error)(
        error.message,
        reason=error.reason,
        metadata={**error.metadata, "left": "true"},
        violations=error.violations,
        retry_after_s=error.retry_after_s,
    )


def took_place(entry: Entry, seen: Observation) -> bool:
    """Whether an observation proves that the action of the entry's phase was done.

    A create without a start proves nothing: a half-made instance can look like a whole one.
    """
    match entry.phase:
        case Phase.CREATING:
            return entry.start and seen.started_at is not None
        case Phase.STARTING | Phase.RESTARTING:
            return seen.started_at is not None and seen.started_at >= entry.since
        case Phase.STOPPING:
            return seen.status not in ACTIVE
        case _:
            return False


def lost(entry: Entry, instances: LocalInstances) -> Observation:
    """The observation of an instance of which its runtime has nothing any more."""
    return Observation(
        instance_id=entry.instance_id,
        generation=entry.generation,
        epoch=entry.epoch,
        status=InstanceStatus.FAILED,
        observed_at=instances.clock.now(),
        reason="RUNTIME_LOST",
        message=f"{entry.driver} has nothing of this instance any more: delete it, or create it again",
    )
