"""What this node has: one slot an instance with its lock, its journalled entry and its newest observation."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import msgspec

from hypervisor.agent.drivers.observed import ObservationBook
from hypervisor.agent.drivers.restart_rules import judge
from hypervisor.agent.entries import Entry, Phase
from hypervisor.agent.journal import Journal
from hypervisor.agent.journal_file import TOMBSTONES
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError, NotFound
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceStatus

__all__ = ["InstanceListener", "InstanceRef", "LocalInstances", "Slot"]

_ENDED_BY = {
    "FENCED": "stopped by its node, from which no server heard for heartbeat.timeout",
    "NODE_RESTARTED": "its node was started anew",
}


@dataclass(frozen=True, slots=True)
class InstanceRef:
    """Which copy of which version of an instance is meant."""

    instance_id: str
    generation: int
    epoch: int


class InstanceListener(Protocol):
    """Who is told of instances. The methods must not block."""

    def observed(self, seen: Observation, *, driver: str, answered: bool) -> None:
        """Something new. ``answered``: a caller gets it as its answer, so it need not be reported."""
        ...

    def deleted(self, instance_id: str) -> None:
        """It is gone."""
        ...


@dataclass(slots=True)
class Slot:
    """One instance id. ``entry`` is None while nothing of it exists; ``busy`` while an action is under way."""

    instance_id: str
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    entry: Entry | None = None
    busy: bool = False
    adopted: bool = True
    """False after a restart until the driver has answered for it."""
    users: int = 0
    changing: bool = False
    """While its driver does what may end its run on the way: such an end is not judged by its restart policy."""


class LocalInstances:
    """All slots, and the only place where their state is changed. On the event loop; no locks but the slots' own."""

    def __init__(
        self,
        *,
        journal: Journal,
        book: ObservationBook,
        clock: Clock,
        listener: InstanceListener,
        rng: random.Random,
    ) -> None:
        self.journal = journal
        self.book = book
        self.clock = clock
        self._listener = listener
        self._rng = rng
        self._restart_due: Callable[[str, datetime], None] = lambda _instance_id, _at: None
        self._slots: dict[str, Slot] = {}
        self._epochs_gone = dict(journal.epochs_gone)
        for entry in journal.entries.values():
            self._slots[entry.instance_id] = Slot(entry.instance_id, entry=entry, adopted=False)

    def on_restart_due(self, tell: Callable[[str, datetime], None]) -> None:
        """Who is told, again and again, that an instance is to be started again, and when."""
        self._restart_due = tell

    def slots(self) -> Iterator[Slot]:
        """Slots that hold an instance, as of now."""
        return iter([slot for slot in self._slots.values() if slot.entry is not None])

    def find(self, instance_id: str) -> Slot | None:
        """The slot of an instance that exists here."""
        slot = self._slots.get(instance_id)
        return slot if slot is not None and slot.entry is not None else None

    def epoch_gone(self, instance_id: str) -> int:
        """Epoch of the copy that was deleted last; 0 for none known (the last 4,096 are)."""
        return self._epochs_gone.get(instance_id, 0)

    @asynccontextmanager
    async def hold(self, instance_id: str) -> AsyncIterator[Slot]:
        """The slot, locked: one action on an instance at a time, in the order they came."""
        slot = self._slots.setdefault(instance_id, Slot(instance_id))
        slot.users += 1
        try:
            async with slot.lock:
                yield slot
        finally:
            slot.users -= 1
            if slot.users == 0 and slot.entry is None and self._slots.get(instance_id) is slot:
                del self._slots[instance_id]

    def existing(self, slot: Slot, ref: InstanceRef) -> Entry:
        """The entry meant by a call. NotFound (``INSTANCE_NOT_FOUND``), FailedPrecondition (``STALE_EPOCH``,
        ``GENERATION_MISMATCH``)."""
        self.refuse_stale(slot, ref)
        entry = slot.entry
        if entry is None or ref.epoch > entry.epoch:
            raise NotFound(
                f"instance {ref.instance_id} (epoch {ref.epoch}) is not on this node: create it here first",
                reason="INSTANCE_NOT_FOUND",
                metadata={"instance": ref.instance_id, "epoch": str(ref.epoch)},
            )
        if ref.generation != entry.generation:
            raise FailedPrecondition(
                f"instance {ref.instance_id} is here in generation {entry.generation}, not {ref.generation}: delete "
                "it and create the wanted generation",
                reason="GENERATION_MISMATCH",
                metadata={
                    "instance": ref.instance_id,
                    "generation": str(ref.generation),
                    "known_generation": str(entry.generation),
                },
            )
        return entry

    def refuse_deleted(self, slot: Slot, ref: InstanceRef) -> None:
        """FailedPrecondition (``STALE_EPOCH``) for a create that was overtaken by the delete of what it makes: the
        network, or a server that is no more, may have held it back for long."""
        if slot.entry is None and ref.epoch <= self.epoch_gone(ref.instance_id):
            raise FailedPrecondition(
                f"instance {ref.instance_id} (epoch {ref.epoch}) was deleted here: an older create came too late",
                reason="STALE_EPOCH",
                metadata={
                    "instance": ref.instance_id,
                    "epoch": str(ref.epoch),
                    "known_epoch": str(self.epoch_gone(ref.instance_id)),
                },
            )

    def refuse_stale(self, slot: Slot, ref: InstanceRef) -> None:
        """FailedPrecondition (``STALE_EPOCH``) for a call about an older placement than this node knows."""
        known = max(slot.entry.epoch if slot.entry else 0, self.epoch_gone(ref.instance_id))
        if ref.epoch < known:
            raise FailedPrecondition(
                f"instance {ref.instance_id}: the call is about epoch {ref.epoch}, this node knows epoch {known}: "
                "read the instance again",
                reason="STALE_EPOCH",
                metadata={
                    "instance": ref.instance_id,
                    "epoch": str(ref.epoch),
                    "known_epoch": str(known),
                },
            )

    def record(self, slot: Slot, seen: Observation, *, answered: bool) -> Observation:
        """Number and keep what was seen of the slot's instance, and tell the listener if it is new."""
        return self._keep(slot, seen, answered=answered, event=False)

    def event(self, slot: Slot, seen: Observation) -> Observation:
        """As :meth:`record`, for what a driver tells unasked; while an action is under way its answer tells it."""
        return self._keep(slot, seen, answered=slot.busy, event=True)

    def last_seen(self) -> tuple[Observation, ...]:
        """Every instance as it was seen last. Of those whose driver could not be asked since the agent's restart that
        is what an earlier agent saw, under the sequence it had then."""
        found = []
        for slot in self.slots():
            if slot.entry is not None and slot.entry.phase is not Phase.UNDOING:
                seen = self.book.newest(slot.instance_id) or slot.entry.last
                if seen is not None:
                    found.append(seen)
        return tuple(found)

    def see_again(self) -> tuple[Observation, ...]:
        """As :meth:`last_seen`, each that is still being watched seen anew: for a server that has lost sight of the
        node and takes nothing but newer observations."""
        self.book.renumber(self.clock.now())
        return self.last_seen()

    def announce(self, slot: Slot) -> None:
        """Tell the listener the newest observation although it was an answer: nobody was there to take it."""
        newest = self.book.newest(slot.instance_id)
        if newest is not None and slot.entry is not None:
            self._listener.observed(newest, driver=slot.entry.driver, answered=False)

    def report_failed_create(self, entry: Entry, error: HypervisorError) -> None:
        """Tell the listener that a create nobody waits for any more failed and was undone."""
        failed = Observation(
            instance_id=entry.instance_id,
            generation=entry.generation,
            epoch=entry.epoch,
            status=InstanceStatus.FAILED,
            observed_at=self.clock.now(),
            reason="CREATE_FAILED",
            message=error.message,
        )
        numbered, _ = self.book.record(failed)
        self.book.forget(entry.instance_id)
        self._listener.observed(numbered, driver=entry.driver, answered=False)

    def mark(self, slot: Slot, status: InstanceStatus) -> Observation | None:
        """Record a transitional state; returns what was seen before."""
        entry = slot.entry
        assert entry is not None
        before = self.book.newest(slot.instance_id)
        shown = before or Observation(
            instance_id=slot.instance_id,
            generation=entry.generation,
            epoch=entry.epoch,
            status=status,
            observed_at=self.clock.now(),
        )
        now = self.clock.now()
        self.record(
            slot,
            msgspec.structs.replace(shown, status=status, reason="", message="", observed_at=now),
            answered=True,
        )
        return before

    def forget(self, slot: Slot, *, epoch: int | None = None) -> None:
        """The instance is gone from this node; copies up to ``epoch`` (None: its own) will not be made any more."""
        entry = slot.entry
        assert entry is not None
        slot.entry = None
        gone = max(entry.epoch if epoch is None else epoch, self.epoch_gone(entry.instance_id))
        self.journal.forget_soon(entry.instance_id, epoch=gone)
        self._bury(entry.instance_id, gone)
        self.book.forget(entry.instance_id)
        self._listener.deleted(entry.instance_id)

    async def forget_unseen(self, ref: InstanceRef) -> None:
        """A copy that never came here was deleted: its create, should it still come, is too late."""
        if ref.epoch > self.epoch_gone(ref.instance_id):
            await self.journal.forget(ref.instance_id, epoch=ref.epoch)
            self._bury(ref.instance_id, ref.epoch)

    def _bury(self, instance_id: str, epoch: int) -> None:
        self._epochs_gone.pop(instance_id, None)
        self._epochs_gone[instance_id] = epoch
        if len(self._epochs_gone) > TOMBSTONES:
            del self._epochs_gone[next(iter(self._epochs_gone))]

    def _keep(self, slot: Slot, seen: Observation, *, answered: bool, event: bool) -> Observation:
        entry = slot.entry
        assert entry is not None
        seen = msgspec.structs.replace(seen, generation=entry.generation, epoch=entry.epoch)
        if entry.ended_by and seen.status in (InstanceStatus.STOPPED, InstanceStatus.FAILED):
            seen = msgspec.structs.replace(
                seen, status=InstanceStatus.STOPPED, reason=entry.ended_by, message=_ENDED_BY[entry.ended_by]
            )
        if not slot.changing and entry.ended_by != "FENCED":
            # What was fenced is started again by the servers, who know whether it runs elsewhere.
            entry, seen = judge(entry, seen, now=self.clock.now(), rng=self._rng)
            slot.entry = entry
        kept, new = self.book.event(seen) if event else self.book.record(seen)
        if new:
            if entry.phase is Phase.READY:
                slot.entry = msgspec.structs.replace(entry, last=kept)
                self.journal.put_soon(slot.entry)
            self._listener.observed(kept, driver=entry.driver, answered=answered)
        if entry.restarts.next_at is not None:
            self._restart_due(entry.instance_id, entry.restarts.next_at)
        return kept
