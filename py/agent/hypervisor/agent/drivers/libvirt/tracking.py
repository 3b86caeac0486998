"""Every instance this driver knows: found again by its metadata, observed, settled, adopted after a restart.

The driver's verbs (:mod:`.driver`) are built of these; the event feed calls ``on_event``, ``resync`` and ``look``.
"""

from dataclasses import dataclass

import libvirt
import structlog
from msgspec.structs import replace

from hypervisor.agent.drivers.fifo_console import FifoConsole
from hypervisor.agent.drivers.keyed_locks import KeyedLocks
from hypervisor.agent.drivers.libvirt.connection import DomainEvent
from hypervisor.agent.drivers.libvirt.console import PipeFifos
from hypervisor.agent.drivers.libvirt.failures import instance_not_found
from hypervisor.agent.drivers.libvirt.machines import Found, Machines
from hypervisor.agent.drivers.libvirt.observing import Phase, end_of_run, observe
from hypervisor.agent.drivers.libvirt.record import Record
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, HypervisorError, NotFound, Unavailable
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceStatus

__all__ = ["DRIVER_NAME", "Live", "Tracker"]

DRIVER_NAME = "libvirt"

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Live:
    """What this process remembers of an instance; everything can be found again without it."""

    console: FifoConsole | None = None
    panicked: bool = False
    """Whether libvirt has told that the guest's kernel panicked, in this run."""
    told: tuple[InstanceStatus, str] | None = None
    """Status and reason as the platform was told last."""


class Tracker:
    """The instances of one libvirt. ``locks`` is held by whoever changes an instance."""

    def __init__(self, machines: Machines, fifos: PipeFifos, *, clock: Clock, uri: str) -> None:
        self._machines = machines
        self._fifos = fifos
        self._clock = clock
        self._uri = uri
        self._versions = ""
        self.locks = KeyedLocks()
        self.live: dict[str, Live] = {}

    @property
    def versions(self) -> str:
        """``libvirt 9.0.0, QEMU 7.2.22``; empty until it answered once."""
        return self._versions

    async def probe(self) -> str:
        """Ask libvirt for its version; raises when it does not answer."""
        library, hypervisor = await self._machines.versions()
        self._versions = f"libvirt {library}, QEMU {hypervisor}"
        return self._versions

    def live_of(self, instance_id: str) -> Live:
        """What is remembered of it."""
        return self.live.setdefault(instance_id, Live())

    async def find(self, instance_id: str) -> Found:
        """It, as libvirt has it now. ``NotFound`` (``INSTANCE_NOT_FOUND``)."""
        try:
            found = await self._machines.find(instance_id)
        except ValueError as exc:
            raise FailedPrecondition(
                f"the metadata of domain {instance_id} was changed ({exc}): remove it with virsh undefine",
                reason="DOMAIN_UNREADABLE",
                metadata={"instance_id": instance_id},
            ) from exc
        if found is None:
            raise instance_not_found(instance_id, self._uri)
        return found

    async def running(self, instance_id: str) -> Found:
        """It, which runs or is paused. ``FailedPrecondition`` (``NOT_RUNNING``)."""
        found = await self.find(instance_id)
        if found.state.phase is Phase.OFF:
            raise self.not_running(instance_id)
        return found

    @staticmethod
    def not_running(instance_id: str) -> FailedPrecondition:
        """The error for what needs a running instance."""
        return FailedPrecondition(
            f"instance {instance_id} does not run: start it first",
            reason="NOT_RUNNING",
            metadata={"instance_id": instance_id, "status": InstanceStatus.STOPPED},
        )

    def observe(self, found: Found) -> Observation:
        """What the platform is told of it. One that has ended is described as it will be recorded."""
        record = found.record
        if self._ended_unrecorded(found):
            record = self._with_end(found, requested=record.stop_asked)
        kind = {"kvm": "KVM", "qemu": "TCG"}.get(record.accelerator, record.accelerator)
        runtime = f"{self._versions or DRIVER_NAME} ({kind})"
        return observe(record, found.state, runtime=runtime, now=self._clock.now())

    async def told(self, instance_id: str) -> Observation:
        """It as it is now, remembered as what the platform was told."""
        observation = self.observe(await self.find(instance_id))
        self.live_of(instance_id).told = (observation.status, observation.reason)
        return observation

    async def list(self) -> tuple[Observation, ...]:
        """Every domain of ours, as it is now."""
        return tuple(self.observe(found) for found in await self._machines.list())

    # The end of a run. All are called with the instance's lock held.

    async def settle(self, instance_id: str, *, requested: bool) -> Observation:
        """Record how a run ended, if one has, and tell how the instance is."""
        found = await self.find(instance_id)
        if self._ended_unrecorded(found):
            record = self._with_end(found, requested=requested or found.record.stop_asked)
            await self._machines.write_record(record)
            found = Found(record, found.state)
            self.live_of(instance_id).panicked = False
        observation = self.observe(found)
        self.live_of(instance_id).told = (observation.status, observation.reason)
        return observation

    def _ended_unrecorded(self, found: Found) -> bool:
        return (
            found.state.phase is Phase.OFF
            and found.record.started_at is not None
            and found.record.end is None
        )

    def _with_end(self, found: Found, *, requested: bool) -> Record:
        end = end_of_run(
            found.state,
            requested=requested,
            panicked=self.live_of(found.record.instance_id).panicked,
            now=self._clock.now(),
        )
        return replace(found.record, end=end)

    async def note_stop(self, record: Record) -> None:
        """Record that the run is told to end, before it is.

        Should the agent die before it sees the end, the next one knows that it was asked for.
        """
        if not record.stop_asked:
            await self._machines.write_record(replace(record, stop_asked=True))

    async def adopt(self, instance_id: str) -> Observation | None:
        """Take it over as another agent process left it; None when there is none."""
        try:
            found = await self.find(instance_id)
        except NotFound:
            return None
        if found.state.phase is Phase.OFF:
            return await self.settle(instance_id, requested=False)
        record = found.record
        if record.started_at is None or record.end is not None:
            # Started by an agent that died before it could record it, or by somebody else.
            record = replace(record, started_at=self._clock.now(), stop_asked=False, end=None)
            await self._machines.write_record(record)
        self._fifos.adopt(instance_id)
        observation = self.observe(Found(record, found.state))
        self.live_of(instance_id).told = (observation.status, observation.reason)
        return observation

    # What happens by itself.

    async def on_event(self, event: DomainEvent) -> Observation | None:
        """Settle what happened; None for what the platform knows or never cared for."""
        if event.event == libvirt.VIR_DOMAIN_EVENT_CRASHED:
            # Told just before the guest is ended; by itself it is not yet an end.
            self.live_of(event.name).panicked = True
        return await self._changed(event.name)

    async def look(self) -> tuple[Observation, ...]:
        """Every instance that is not as the platform was told, should an event have been lost."""
        changed = []
        for found in await self._machines.list():
            seen = self.observe(found)
            live = self.live_of(seen.instance_id)
            if live.told != (seen.status, seen.reason) or self._ended_unrecorded(found):
                observation = await self._changed(seen.instance_id)
                if observation is not None:
                    _log.info("domain_change_without_event", instance_id=seen.instance_id, status=seen.status)
                    changed.append(observation)
        return tuple(changed)

    async def _changed(self, instance_id: str) -> Observation | None:
        async with self.locks.hold(instance_id):
            before = self.live_of(instance_id).told
            try:
                observation = await self.adopt(instance_id)
            except Unavailable:
                raise
            except HypervisorError as exc:
                # One domain that cannot be looked at must not hold up the events of all others.
                _log.warning("domain_event_not_settled", instance_id=instance_id, error=str(exc))
                return None
            if observation is None:
                self.live.pop(instance_id, None)
                return None
            told = (observation.status, observation.reason)
            return None if told == before else observation

    async def resync(self) -> tuple[Observation, ...]:
        """Every instance as it is now, ended ones settled."""
        observations = []
        for found in await self._machines.list():
            instance_id = found.record.instance_id
            async with self.locks.hold(instance_id):
                try:
                    adopted = await self.adopt(instance_id)
                except Unavailable:
                    raise
                except HypervisorError as exc:
                    _log.warning("domain_not_adopted", instance_id=instance_id, error=str(exc))
                    adopted = self.observe(found)
            if adopted is not None:
                observations.append(adopted)
        return tuple(observations)
