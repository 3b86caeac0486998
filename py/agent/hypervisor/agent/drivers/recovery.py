"""After a restart, or after a runtime came back: adopt what runs, find what the journal does not know, finish what was
cut off. Running instances are not disturbed by any of it."""

import asyncio

import structlog

from hypervisor.agent.drivers.actions import Actions, lost
from hypervisor.agent.drivers.driver import Driver
from hypervisor.agent.drivers.health import DriverHealth
from hypervisor.agent.drivers.instances import LocalInstances, Slot
from hypervisor.agent.entries import Entry, Phase
from hypervisor.core.errors import DeadlineExceeded, HypervisorError, Unavailable
from hypervisor.core.model import Observation

__all__ = ["Recovery"]

_AT_ONCE = 16
"""Adoptions asked of a driver at the same time."""

_log = structlog.get_logger(__name__)


class Recovery:
    """Adoption and settling; the manager decides when."""

    def __init__(self, *, instances: LocalInstances, drivers: DriverHealth, actions: Actions) -> None:
        self._instances = instances
        self._drivers = drivers
        self._actions = actions

    async def adopt(self, name: str) -> bool:
        """Adopt the instances of one driver that were not adopted yet, then those the journal does not know.

        A driver that cannot be reached leaves them for the next time; whether it told all it has.
        """
        driver = self._drivers.named(name)
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(instance_id: str) -> None:
            async with gate, self._instances.hold(instance_id) as slot:
                if slot.entry is not None and not slot.adopted:
                    await self._adopt_one(driver, slot, slot.entry)

        waiting = [
            slot.instance_id
            for slot in self._instances.slots()
            if not slot.adopted and slot.entry is not None and slot.entry.driver == name
        ]
        async with asyncio.TaskGroup() as group:
            for instance_id in waiting:
                group.create_task(one(instance_id))
        return await self._find_unknown(driver)

    async def settle(self, slot: Slot) -> None:
        """Finish what was cut off, with the slot held. What cannot be finished now stays for the next time; a create
        that cannot be finished at all is undone and reported."""
        entry = slot.entry
        if entry is None or entry.phase is Phase.READY:
            return
        try:
            await self._actions.settle(slot)
        except (Unavailable, DeadlineExceeded) as exc:
            _log.warning("instance_settling_waits", instance=entry.instance_id, reason=exc.reason)
        except HypervisorError as exc:
            _log.warning(
                "instance_settling_failed", instance=entry.instance_id, reason=exc.reason, error=exc.message
            )
            if slot.entry is None:
                self._instances.report_failed_create(entry, exc)
        else:
            slot.adopted = True
            self._instances.announce(slot)

    async def _adopt_one(self, driver: Driver, slot: Slot, entry: Entry) -> None:
        asked_at = self._instances.book.events_of(entry.instance_id)
        try:
            seen = await driver.recover(entry.instance_id, entry.handle)
        except HypervisorError as exc:
            _log.warning(
                "instance_not_adopted", instance=entry.instance_id, reason=exc.reason, error=exc.message
            )
            return
        slot.adopted = True
        if seen is not None:
            # Settled first: of one in the midst of an action no end is judged by its restart policy.
            self._actions.settle_by(slot, seen)
            if self._instances.book.events_of(entry.instance_id) == asked_at:
                self._instances.record(slot, seen, answered=False)
            _log.info("instance_adopted", instance=entry.instance_id, status=str(seen.status))
        elif entry.phase in (Phase.CREATING, Phase.UNDOING, Phase.DELETING):
            pass  # Nothing of it is what these may well find; settling goes on from there.
        else:
            self._instances.record(slot, lost(entry, self._instances), answered=False)
            _log.warning("instance_lost", instance=entry.instance_id, driver=driver.name)

    async def _find_unknown(self, driver: Driver) -> bool:
        try:
            found = await driver.list()
        except HypervisorError as exc:
            _log.warning("driver_list_failed", driver=driver.name, reason=exc.reason, error=exc.message)
            return False
        for seen in found:
            if self._instances.find(seen.instance_id) is None:
                await self.take_in(driver, seen)
        return True

    async def take_in(self, driver: Driver, seen: Observation) -> None:
        """One of ours that the journal does not know: keep it, so that it is reported and can be deleted."""
        async with self._instances.hold(seen.instance_id) as slot:
            if slot.entry is not None or seen.epoch <= self._instances.epoch_gone(seen.instance_id):
                return
            slot.entry = Entry(
                instance_id=seen.instance_id,
                driver=driver.name,
                generation=seen.generation,
                epoch=seen.epoch,
                phase=Phase.READY,
                since=self._instances.clock.now(),
            )
            self._instances.journal.put_soon(slot.entry)
            self._instances.record(slot, seen, answered=False)
        _log.warning("instance_found", instance=seen.instance_id, driver=driver.name, status=str(seen.status))
