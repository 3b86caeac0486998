"""What may run here: the gate that every start passes, and the loop that stops what must not run any more."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import msgspec
import structlog

from hypervisor.agent.drivers.instances import LocalInstances, Slot
from hypervisor.agent.entries import Entry, Phase
from hypervisor.agent.fencing.killing import MARGIN_S, kill_instances
from hypervisor.agent.fencing.lease import Lease
from hypervisor.agent.fencing.marks import Marks
from hypervisor.core.availability import FencingState, NodeFencing
from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError, ResourceExhausted, Unavailable
from hypervisor.core.states import ACTIVE, InstanceStatus

__all__ = ["FENCED", "NODE_RESTARTED", "Fence", "Fencing", "Guard", "NoGuard"]

FENCED = "FENCED"
NODE_RESTARTED = "NODE_RESTARTED"
"""Reasons of observations: how a run ended that nobody wanted to end."""

_LOOK_S = 0.5
"""At most so long after the lease's end the loop notices it: a suspended machine wakes up in the middle of a sleep."""
_RUNTIME_S = 1.5
"""So long a runtime may take for a forced stop; after that processes are killed."""
_RESTING = frozenset({InstanceStatus.STOPPED, InstanceStatus.FAILED})

_log = structlog.get_logger(__name__)


class Guard(Protocol):
    """What does the agent's part when the agent cannot."""

    async def ensure(self) -> None:
        """Have it run. Returns when it does, or has been tried."""
        ...

    @property
    def trouble(self) -> str:
        """Why it does not run although it should; empty when all is well."""
        ...


class NoGuard:
    """Nothing does it: for nodes whose guests end with the agent, or are fenced by other means."""

    trouble = ""

    async def ensure(self) -> None:
        """Nothing to do."""


class Fence:
    """The node's gate, and what it tells of its fencing."""

    def __init__(
        self, lease: Lease, *, marks: Marks, guard: Guard, clock: Clock, enabled: bool = True
    ) -> None:
        self._lease = lease
        self._marks = marks
        self._guard = guard
        self._clock = clock
        self._enabled = enabled
        self._protected = False
        self.busy = False
        """Whether something that must not run may still do so."""

    @property
    def armed(self) -> bool:
        """Whether the end of the lease has consequences."""
        return self._enabled and not self._lease.disarmed

    @property
    def closed(self) -> bool:
        return self.armed and not self._lease.held

    def check(self, entry: Entry) -> None:
        if entry.stops and self.closed:
            raise Unavailable(
                f"instance {entry.instance_id} is not started: no server has heard from this node for "
                "heartbeat.timeout, so it may run elsewhere",
                reason="NODE_FENCED",
                metadata={"instance": entry.instance_id},
                retry_after_s=5.0,
            )

    async def protect(self, instance_id: str) -> None:
        try:
            self._marks.add(instance_id)
        except OSError as exc:
            raise ResourceExhausted(
                f"instance {instance_id} cannot be marked as one to be fenced: {exc.strerror}. Free space in "
                "agent.data_dir",
                reason="JOURNAL_FULL",
                metadata={"instance": instance_id},
            ) from exc
        self._protected = True
        if self._enabled:
            await self._guard.ensure()

    def released(self, instance_id: str) -> None:
        """The instance is gone."""
        self._marks.remove(instance_id)

    def keep(self, instance_ids: Iterable[str]) -> None:
        """These are all that have to be stopped."""
        wanted = tuple(instance_ids)
        self._protected = bool(wanted)
        self._marks.keep(wanted)

    async def guarded(self) -> None:
        """Have the guard run where there is something to guard."""
        if self._protected and self._enabled:
            await self._guard.ensure()

    def state(self) -> NodeFencing:
        """What servers are told."""
        if not self._enabled:
            return NodeFencing(
                state=FencingState.DISARMED, reason="fencing.enabled is false in the agent's configuration"
            )
        if self._lease.disarmed:
            return NodeFencing(state=FencingState.DISARMED, reason="switched off")
        if self._protected and self._guard.trouble:
            return NodeFencing(state=FencingState.DISARMED, reason=self._guard.trouble)
        if not self.closed:
            return NodeFencing(state=FencingState.ARMED)
        return NodeFencing(state=FencingState.FENCING if self.busy else FencingState.FENCED)

    def pause_s(self) -> float:
        """How long the loop may sleep."""
        left_s = self._lease.until_s - self._clock.monotonic()
        return min(max(left_s, 0.02), _LOOK_S) if left_s > 0 else _LOOK_S


def _kill(instance_ids: frozenset[str], started_before_s: float) -> frozenset[str]:
    return kill_instances(instance_ids, started_before_s=started_before_s)


class Fencing:
    """Stops what must not run. ``stop``: the manager's way, through the runtime."""

    def __init__(
        self,
        fence: Fence,
        lease: Lease,
        *,
        instances: LocalInstances,
        stop: Callable[[str], Awaitable[object]],
        clock: Clock,
        kill: Callable[[frozenset[str], float], frozenset[str]] = _kill,
    ) -> None:
        self._fence = fence
        self._lease = lease
        self._instances = instances
        self._stop = stop
        self._clock = clock
        self._kill = kill
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self._told_closed = False
        _note_interrupted(instances, lease, closed=fence.closed)
        fence.keep(slot.instance_id for slot in instances.slots() if _stops(slot))
        fence.busy = bool(self._running())

    async def run(self) -> None:
        """Watch the lease for ever. Needs no server, and begins before anything is adopted."""
        try:
            while True:
                await self._fence.guarded()
                if self._fence.closed:
                    await self._close()
                elif self._told_closed:
                    self._told_closed = False
                    _log.info("fence_opened")
                await self._clock.sleep(self._fence.pause_s())
        finally:
            for task in self._stopping.values():
                task.cancel()

    async def _close(self) -> None:
        running = self._running()
        self._fence.busy = bool(running)
        if not self._told_closed:
            self._told_closed = True
            _log.warning("fence_closed", running=len(running))
        if not running:
            return
        for instance_id in running:
            if instance_id not in self._stopping:
                task = asyncio.create_task(self._stop_one(instance_id), name=f"fence-{instance_id}")
                self._stopping[instance_id] = task
        await asyncio.wait([self._stopping[instance_id] for instance_id in running], timeout=_RUNTIME_S)
        left = frozenset(self._running())
        if left and self._fence.closed:
            remaining = await asyncio.to_thread(self._kill, left, self._lease.until_s + MARGIN_S)
            _log.warning("fence_killed", instances=sorted(left)[:20], count=len(left), left=len(remaining))
        for instance_id, task in tuple(self._stopping.items()):
            if task.done():
                del self._stopping[instance_id]
        self._fence.busy = bool(self._running())
        if not self._fence.busy:
            _log.warning("fenced", stopped=len(running))

    async def _stop_one(self, instance_id: str) -> None:
        try:
            await self._stop(instance_id)
        except HypervisorError as exc:
            _log.warning("fence_stop_failed", instance=instance_id, reason=exc.reason, error=exc.message)

    def _running(self) -> list[str]:
        """What has to be stopped and is not known to rest."""
        found = []
        for slot in self._instances.slots():
            if _stops(slot):
                seen = self._instances.book.newest(slot.instance_id) or (slot.entry and slot.entry.last)
                if not seen or seen.status not in _RESTING:
                    found.append(slot.instance_id)
        return found


def _stops(slot: Slot) -> bool:
    return slot.entry is not None and slot.entry.stops and slot.entry.phase is not Phase.UNDOING


def _note_interrupted(instances: LocalInstances, lease: Lease, *, closed: bool) -> None:
    """At the agent's start: of what ran when an agent saw it last, say why it does not any more."""
    for slot in instances.slots():
        entry = slot.entry
        if entry is None or entry.ended_by or entry.last is None or entry.last.status not in ACTIVE:
            continue
        if entry.stops and closed:
            why = FENCED
        elif lease.rebooted:
            why = NODE_RESTARTED
        else:
            continue
        slot.entry = msgspec.structs.replace(entry, ended_by=why)
        instances.journal.put_soon(slot.entry)
