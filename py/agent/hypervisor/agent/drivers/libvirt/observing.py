"""From a domain's state and record to what the platform is told of the instance. Pure but for libvirt's names."""

import enum
from dataclasses import dataclass
from datetime import datetime

import libvirt

from hypervisor.agent.drivers.libvirt.record import Record, RunEnd
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceStatus

__all__ = ["FORCED_EXIT_CODE", "DomainState", "Phase", "end_of_run", "observe"]

FORCED_EXIT_CODE = 137
"""As that of a process ended by SIGKILL."""


class Phase(enum.Enum):
    """What a domain is doing."""

    RUNNING = enum.auto()
    PAUSED = enum.auto()
    OFF = enum.auto()


_PAUSED_FOR_A_MOMENT = frozenset(
    {
        # libvirt holds the guest while it works on it: the platform sees it running.
        libvirt.VIR_DOMAIN_PAUSED_SAVE,
        libvirt.VIR_DOMAIN_PAUSED_DUMP,
        libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT,
        libvirt.VIR_DOMAIN_PAUSED_STARTING_UP,
        libvirt.VIR_DOMAIN_PAUSED_FROM_SNAPSHOT,
    }
)
_OFF = frozenset({libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_NOSTATE, libvirt.VIR_DOMAIN_CRASHED})

_MESSAGES = {
    "EXITED": "the guest switched itself off",
    "KILLED": "it was ended by force",
    "SUSPENDED": "its memory is on disk: start goes on from there",
    "RESTORED": "it is as it was when the snapshot was taken",
    "GUEST_PANIC": "the guest's kernel panicked: look at the end of its console",
    "VMM_DIED": "QEMU ended without being asked to (killed, or a fault): look at the node's and libvirt's logs",
    "VM_LOST": "it ended while nobody looked: the node or libvirtd was restarted",
}


@dataclass(frozen=True, slots=True)
class DomainState:
    """State and reason as libvirt numbers them, and whether the guest's memory is on disk."""

    state: int
    reason: int
    saved: bool = False

    @property
    def phase(self) -> Phase:
        """What it is doing."""
        if self.state in _OFF:
            return Phase.OFF
        if self.state == libvirt.VIR_DOMAIN_PAUSED and self.reason not in _PAUSED_FOR_A_MOMENT:
            return Phase.PAUSED
        return Phase.RUNNING


def end_of_run(state: DomainState, *, requested: bool, panicked: bool, now: datetime) -> RunEnd:
    """How a run ended, from why libvirt says that the domain is off."""
    reason, code = "VM_LOST", None
    if state.saved:
        reason, code = "SUSPENDED", 0
    elif panicked or state.state == libvirt.VIR_DOMAIN_CRASHED:
        reason = "GUEST_PANIC"
    elif state.reason == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN:
        reason, code = "EXITED", 0
    elif state.reason == libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED or requested:
        reason, code = "KILLED", FORCED_EXIT_CODE
    elif state.reason in (libvirt.VIR_DOMAIN_SHUTOFF_CRASHED, libvirt.VIR_DOMAIN_SHUTOFF_FAILED):
        reason = "VMM_DIED"
    return RunEnd(exit_code=code, finished_at=now, reason=reason, requested=requested)


def observe(record: Record, state: DomainState, *, runtime: str, now: datetime) -> Observation:
    """The observation. One that is off is described by its record, where its end is recorded first."""
    end = record.end
    reason = message = ""
    if state.phase is Phase.OFF:
        status = InstanceStatus.STOPPED
        if end is not None:
            failed = not end.requested and end.exit_code != 0
            status = InstanceStatus.FAILED if failed else InstanceStatus.STOPPED
            reason, message = end.reason, _MESSAGES.get(end.reason, "")
    else:
        end = None
        status = InstanceStatus.RUNNING if state.phase is Phase.RUNNING else InstanceStatus.PAUSED
        if state.phase is Phase.PAUSED and state.reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR:
            reason = "IO_ERROR"
            message = (
                "QEMU could not read or write its disk (is the node's disk full?): mend that and resume it"
            )
    return Observation(
        instance_id=record.instance_id,
        generation=record.generation,
        epoch=record.epoch,
        status=status,
        observed_at=now,
        reason=reason,
        message=message,
        exit_code=None if end is None else end.exit_code,
        started_at=record.started_at,
        finished_at=None if end is None else end.finished_at,
        runtime=runtime,
        runtime_reason=record.accelerator_reason,
    )
