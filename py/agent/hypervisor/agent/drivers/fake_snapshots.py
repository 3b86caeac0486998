"""Snapshots of fake instances: what is kept in a record of how it was. Pure."""

from datetime import datetime

from hypervisor.agent.drivers.fake_state import FakeRecord, FakeSnapshot
from hypervisor.core.errors import FailedPrecondition, NotFound
from hypervisor.core.machines import Snapshot, SnapshotKind

__all__ = ["find", "forget", "keep"]


def keep(record: FakeRecord, name: str, *, kind: SnapshotKind, now: datetime) -> Snapshot:
    """Keep the present state; one that is kept under the name is left alone."""
    known = next((kept.snapshot for kept in record.snapshots if kept.snapshot.name == name), None)
    if known is not None:
        return known
    made = Snapshot(
        name=name,
        created_at=now,
        kind=kind,
        parent=record.snapshots[-1].snapshot.name if record.snapshots else "",
        memory=record.running,
        size_bytes=0,
    )
    record.snapshots.append(FakeSnapshot(snapshot=made, running=record.running, paused=record.paused))
    return made


def find(record: FakeRecord, name: str) -> FakeSnapshot:
    """The state kept under the name. NotFound (``SNAPSHOT_NOT_FOUND``)."""
    for kept in record.snapshots:
        if kept.snapshot.name == name:
            return kept
    instance_id = record.assignment.instance_id
    raise NotFound(
        f"instance {instance_id} has no snapshot {name}: see `instance snapshot list`",
        reason="SNAPSHOT_NOT_FOUND",
        metadata={"instance": instance_id, "snapshot": name},
    )


def forget(record: FakeRecord, name: str) -> bool:
    """Forget the state kept under the name; whether there was one. FailedPrecondition (``SNAPSHOT_IN_USE``)."""
    left = [kept for kept in record.snapshots if kept.snapshot.name != name]
    based = next(
        (
            kept.snapshot.name
            for kept in left
            if kept.snapshot.kind is SnapshotKind.DIFF and kept.snapshot.parent == name
        ),
        None,
    )
    if based is not None:
        instance_id = record.assignment.instance_id
        raise FailedPrecondition(
            f"snapshot {name} of {instance_id} is the base of {based}: delete that one first",
            reason="SNAPSHOT_IN_USE",
            metadata={"instance": instance_id, "snapshot": name, "used_by": based},
        )
    existed = len(left) < len(record.snapshots)
    record.snapshots = left
    return existed
