"""Giving a microVM more or less: at rest what it starts with, while it runs its share of the processors alone."""

from msgspec.structs import replace

from hypervisor.agent.drivers.cpu_quota import apply_cpu_limit, cpu_limit
from hypervisor.agent.drivers.microvm.runner import Runner
from hypervisor.agent.drivers.microvm.tracking import Live, Tracker
from hypervisor.core.errors import FailedPrecondition
from hypervisor.core.model import Observation, Sizes

__all__ = ["resize"]


def resize(tracker: Tracker, runner: Runner, live: Live, sizes: Sizes) -> Observation:
    """See ``Updating``. The instance's lock is held. Raises OSError where its control group cannot be written."""
    record = live.record
    before, after = tracker.machine(record), replace(record, spec=sizes.of(record.spec))
    wanted = tracker.machine(after)
    machine_changes = (before.vcpus, before.memory_mib) != (wanted.vcpus, wanted.memory_mib)
    if machine_changes:
        if live.running:
            raise _refused(
                live, f"processors and memory of {record.vmm_version} are fixed while it runs: stop it first"
            )
        if record.suspended:
            raise _refused(live, "its memory is on disk: start it, and stop it, first")
        if any(kept.snapshot.memory for kept in record.snapshots):
            raise _refused(live, "its snapshots hold memory of the size it has now: delete them first")
    if live.running:
        paths = runner.groups.paths(record.instance_id)
        apply_cpu_limit(paths, cpu_limit(sizes.cpu_millis))
    tracker.save(live, after)
    return tracker.observe(live)


def _refused(live: Live, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"instance {live.record.instance_id} cannot be given other sizes now: {why}",
        reason="UPDATE_REFUSED",
        metadata={"instance_id": live.record.instance_id},
    )
