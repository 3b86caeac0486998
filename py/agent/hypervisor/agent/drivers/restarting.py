"""Starting again what ended by itself, as its policy says: by the agent alone, whether a server can be reached or not.

What is to be done is decided in :mod:`.restart_rules` about everything that is seen of an instance; here is who waits
and acts. Where an
instance stands is in its journal entry, so that a restart of the agent neither forgets nor repeats anything:

- an end is decided about once: from then on ``restarts.next_at`` or ``restarts.exhausted`` is set;
- a restart is counted in the same record that announces the start, before the driver is asked;
- a restart that fails leaves an instance that has ended and is not decided about: the same rule decides it.
"""

import asyncio
from datetime import datetime

import structlog

from hypervisor.agent.drivers.actions import Actions
from hypervisor.agent.drivers.health import DriverHealth
from hypervisor.agent.drivers.instances import LocalInstances
from hypervisor.core.clock import Clock
from hypervisor.core.errors import HypervisorError

__all__ = ["Restarter"]

_AT_ONCE = 16
"""Restarts at the same time: after a restart of the machine everything ends at once."""
_DRIVER_POLL_S = 1.0

_log = structlog.get_logger(__name__)


class Restarter:
    """Starts instances again when their time has come. ``group`` is set while the manager runs."""

    def __init__(
        self, *, instances: LocalInstances, drivers: DriverHealth, actions: Actions, clock: Clock
    ) -> None:
        self._instances = instances
        self._drivers = drivers
        self._actions = actions
        self._clock = clock
        self._waiting: dict[str, datetime] = {}
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self.group: asyncio.TaskGroup | None = None
        instances.on_restart_due(self._due)

    def _due(self, instance_id: str, at: datetime) -> None:
        if self.group is None or self._waiting.get(instance_id) == at:
            return
        self._waiting[instance_id] = at
        self.group.create_task(self._restart_at(instance_id, at), name=f"restart-{instance_id}")

    async def _restart_at(self, instance_id: str, at: datetime) -> None:
        try:
            await self._clock.sleep(self._wait_s(instance_id, at))
            while not self._can_act(instance_id, at):
                if not self._still_due(instance_id, at):
                    return
                await self._clock.sleep(_DRIVER_POLL_S)
            async with self._gate, self._instances.hold(instance_id) as slot:
                entry = slot.entry
                if entry is None or not self._still_due(instance_id, at):
                    return
                _log.info("instance_restarting", instance=instance_id, count=entry.restarts.count + 1)
                await self._actions.start_again(slot, entry)
        except HypervisorError as exc:
            # What it is now was recorded, and judged: it is tried again, or given up.
            _log.warning(
                "instance_restart_failed", instance=instance_id, reason=exc.reason, error=exc.message
            )
        except Exception:
            _log.exception("manager_defect", instance=instance_id)
        finally:
            if self._waiting.get(instance_id) == at:
                del self._waiting[instance_id]

    def _wait_s(self, instance_id: str, at: datetime) -> float:
        """Never more than the policy's longest delay, wherever the wall clock has jumped to."""
        slot = self._instances.find(instance_id)
        policy = None if slot is None or slot.entry is None else slot.entry.restart
        left_s = (at - self._clock.now()).total_seconds()
        return max(0.0, min(left_s, policy.max_delay_s if policy is not None else 0.0))

    def _can_act(self, instance_id: str, at: datetime) -> bool:
        slot = self._instances.find(instance_id)
        return (
            slot is not None
            and slot.entry is not None
            and slot.adopted
            and self._drivers.available(slot.entry.driver)
            and self._still_due(instance_id, at)
        )

    def _still_due(self, instance_id: str, at: datetime) -> bool:
        """Whether nobody has decided otherwise since."""
        slot = self._instances.find(instance_id)
        return slot is not None and slot.entry is not None and slot.entry.restarts.next_at == at
