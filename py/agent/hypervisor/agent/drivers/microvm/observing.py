"""From an instance's record to what the platform is told of it, and to the machine its VMM is told of. Pure."""

from datetime import datetime

from hypervisor.agent.drivers.microvm.config import MicrovmConfig
from hypervisor.agent.drivers.microvm.records import Record, RunEnd
from hypervisor.agent.drivers.microvm.taps import tap_mac, tap_name
from hypervisor.agent.drivers.microvm.vmm import Card, End, Machine
from hypervisor.core.machines import MicrovmOptions
from hypervisor.core.model import Observation
from hypervisor.core.states import InstanceStatus

__all__ = ["end_of_run", "machine_of", "observe"]

_KILLED = 137


def machine_of(record: Record, config: MicrovmConfig) -> Machine:
    """All its VMM is told."""
    spec = record.spec
    instance_id = record.instance_id
    return Machine(
        instance_id=instance_id,
        directory=config.data_dir / "instances" / instance_id,
        run_dir=config.run_dir / instance_id,
        vcpus=max(1, -(-spec.cpu_millis // 1000)),
        memory_mib=spec.memory_mb,
        kernel_args=spec.kernel_args,
        initrd=record.initrd,
        disk=record.disk,
        cards=tuple(
            Card(tap=tap_name(instance_id, index), mac=network.mac or tap_mac(instance_id, index))
            for index, network in enumerate(spec.networks)
        ),
        options=spec.microvm or MicrovmOptions(),
        uid=record.uid,
    )


def end_of_run(
    end: End,
    *,
    requested: bool,
    forced: bool,
    suspended: bool,
    oom_kills: int,
    now: datetime,
    earlier_boot: bool = False,
) -> RunEnd:
    """How a run ended, from what its VMM makes of it and what the driver knows. ``forced``: the driver sent a SIGKILL,
    which one that ended by itself in the same moment did not get.
    ``earlier_boot``: it was a run before the node's restart."""
    exit_code, message = end.exit_code, end.message
    if suspended:
        reason, message = "SUSPENDED", "its memory is on disk: the next start goes on from there"
    elif earlier_boot and end.crashed:
        reason, message = "NODE_RESTARTED", "the node was restarted while it ran"
    elif forced and (end.crashed or exit_code is None):
        reason, message = "KILLED", "it was ended by force as asked"
        exit_code = _KILLED if exit_code is None else exit_code
    elif not end.crashed:
        reason = "EXITED"
    elif oom_kills:
        reason = "OOM_KILLED"
        message = (
            f"{message}: the kernel killed it at its memory limit, which has room for the guest's memory"
        )
    elif exit_code is None or (exit_code > 128 and "ended by" in message):
        reason = "KILLED"
    else:
        reason = "CRASHED"
    return RunEnd(
        reason=reason, message=message, finished_at=now, exit_code=exit_code, requested=requested or suspended
    )


def observe(record: Record, *, running: bool, now: datetime) -> Observation:
    """The observation."""
    end = None if running else record.end
    status, reason, message = InstanceStatus.STOPPED, "", ""
    if running:
        status = InstanceStatus.PAUSED if record.paused else InstanceStatus.RUNNING
    elif end is not None:
        failed = not end.requested and end.reason != "EXITED"
        status = InstanceStatus.FAILED if failed else InstanceStatus.STOPPED
        reason, message = end.reason, end.message
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
        runtime=record.vmm_version,
        runtime_reason=record.vmm_reason,
    )
