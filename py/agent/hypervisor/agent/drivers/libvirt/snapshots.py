"""States of a virtual machine to go back to: internal snapshots of its qcow2 disk, with memory where it runs."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

import libvirt
from msgspec.structs import replace

from hypervisor.agent.drivers.libvirt.console import PipeFifos
from hypervisor.agent.drivers.libvirt.domain_xml import build_snapshot
from hypervisor.agent.drivers.libvirt.machines import Found, Machines
from hypervisor.agent.drivers.libvirt.observing import Phase
from hypervisor.agent.drivers.libvirt.record import RunEnd
from hypervisor.agent.drivers.libvirt.tracking import Tracker
from hypervisor.agent.drivers.uninterrupted import uninterrupted
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, NotFound, Unimplemented
from hypervisor.core.machines import Snapshot, SnapshotKind
from hypervisor.core.model import Observation

__all__ = ["Snapshots", "parse_snapshot"]


@dataclass(frozen=True, slots=True)
class _Kept:
    snapshot: Snapshot
    state: str
    """``running``, ``paused`` or ``shutoff``: how the guest was when it was taken."""


class Snapshots:
    """The power ``Snapshotting`` of the driver, with the instance's lock held by these methods themselves."""

    def __init__(self, tracker: Tracker, machines: Machines, fifos: PipeFifos, *, clock: Clock) -> None:
        self._tracker = tracker
        self._machines = machines
        self._fifos = fifos
        self._clock = clock

    async def create(self, instance_id: str, name: str, *, kind: SnapshotKind) -> Snapshot:
        """Keep the present state."""
        if kind is not SnapshotKind.FULL:
            raise Unimplemented(
                "libvirt keeps whole snapshots only: leave the kind out, or use full",
                reason="CAPABILITY_MISSING",
                metadata={"instance_id": instance_id, "verb": "snapshot-diff"},
            )
        async with self._tracker.locks.hold(instance_id):
            found = await self._tracker.find(instance_id)
            for kept in await self._kept(instance_id):
                if kept.snapshot.name == name:
                    return kept.snapshot
            self._check_possible(found)
            document = build_snapshot(name)
            await uninterrupted(
                self._machines.with_domain(
                    instance_id,
                    f"take a snapshot of {instance_id}",
                    lambda domain: domain.snapshotCreateXML(document, 0) and None,
                    slow=True,
                )
            )
            return (await self._named(instance_id, name)).snapshot

    async def listed(self, instance_id: str) -> tuple[Snapshot, ...]:
        """All, oldest first."""
        await self._tracker.find(instance_id)
        return tuple(kept.snapshot for kept in await self._kept(instance_id))

    async def restore(self, instance_id: str, name: str) -> Observation:
        """Go back. The guest is a new process of QEMU's afterwards, and its console begins anew."""
        async with self._tracker.locks.hold(instance_id):
            found = await self._tracker.find(instance_id)
            kept = await self._named(instance_id, name)
            return await uninterrupted(self._restore(found, kept))

    async def delete(self, instance_id: str, name: str) -> bool:
        """Forget it; those that were based on it stand alone."""
        async with self._tracker.locks.hold(instance_id):
            await self._tracker.find(instance_id)
            try:
                await self._named(instance_id, name)
            except NotFound:
                return False
            await uninterrupted(
                self._machines.with_domain(
                    instance_id,
                    f"forget snapshot {name} of {instance_id}",
                    lambda domain: domain.snapshotLookupByName(name, 0).delete(0),
                    slow=True,
                )
            )
            return True

    async def _restore(self, found: Found, kept: _Kept) -> Observation:
        instance_id = found.record.instance_id
        await self._machines.drop_saved(instance_id)
        # libvirt would end QEMU itself, or load into it, depending on its version. This way it is always a new one.
        if found.state.phase is not Phase.OFF:
            await self._machines.destroy(instance_id)
        runs = kept.state in ("running", "paused")
        if runs:
            self._fifos.make(instance_id)
        try:
            await self._machines.with_domain(
                instance_id,
                f"go back to snapshot {kept.snapshot.name} of {instance_id}",
                lambda domain: _revert(domain, kept.snapshot.name),
                slow=True,
            )
        finally:
            # The definition kept with the snapshot has come back with the record of that time.
            now = self._clock.now()
            back = RunEnd(exit_code=0, finished_at=now, reason="RESTORED", requested=True)
            record = replace(found.record, stop_asked=False, end=None if runs else back)
            if runs:
                record = replace(record, started_at=now)
            elif found.record.started_at is None:
                record = replace(record, end=None)
            await self._machines.write_record(record)
        return await self._tracker.told(instance_id)

    async def _named(self, instance_id: str, name: str) -> _Kept:
        for kept in await self._kept(instance_id):
            if kept.snapshot.name == name:
                return kept
        raise NotFound(
            f"instance {instance_id} has no snapshot {name}: list its snapshots",
            reason="SNAPSHOT_NOT_FOUND",
            metadata={"instance_id": instance_id, "snapshot": name},
        )

    async def _kept(self, instance_id: str) -> list[_Kept]:
        documents = await self._machines.with_domain(
            instance_id, f"list the snapshots of {instance_id}", _documents
        )
        kept = await asyncio.to_thread(lambda: [parse_snapshot(text, current=c) for text, c in documents])
        # Times are whole seconds; among equals a parent comes before what is based on it, as libvirt listed them.
        return sorted((_Kept(*one) for one in kept), key=lambda one: one.snapshot.created_at)

    @staticmethod
    def _check_possible(found: Found) -> None:
        instance_id = found.record.instance_id
        if not found.record.has_disk:
            raise FailedPrecondition(
                f"instance {instance_id} has no disk for a snapshot to be kept in: give it one (spec.disk_gb)",
                reason="NO_DISK",
                metadata={"instance_id": instance_id},
            )
        if found.record.uefi:
            raise FailedPrecondition(
                f"instance {instance_id} begins with UEFI, whose variables no snapshot holds: use the firmware bios",
                reason="SNAPSHOT_UNSUPPORTED",
                metadata={"instance_id": instance_id},
            )
        if found.state.saved:
            raise FailedPrecondition(
                f"instance {instance_id} is suspended: start it first, or restart it to drop its memory",
                reason="SUSPENDED",
                metadata={"instance_id": instance_id},
            )


def parse_snapshot(text: str, *, current: bool) -> tuple[Snapshot, str]:
    """A snapshot as libvirt describes it, and the state its guest was in. Pure."""
    root = ElementTree.fromstring(text)
    state = root.findtext("state", "")
    memory = root.find("memory")
    snapshot = Snapshot(
        name=root.findtext("name", ""),
        created_at=datetime.fromtimestamp(int(root.findtext("creationTime", "0")), UTC),
        parent=root.findtext("parent/name", ""),
        memory=memory is not None and memory.get("snapshot") in ("internal", "external"),
        current=current,
    )
    return snapshot, state


def _documents(domain: Any) -> list[tuple[str, bool]]:
    listed = domain.listAllSnapshots(libvirt.VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL)
    return [(one.getXMLDesc(0), bool(one.isCurrent(0))) for one in listed]


def _revert(domain: Any, name: str) -> None:
    snapshot = domain.snapshotLookupByName(name, 0)
    try:
        domain.revertToSnapshot(snapshot, 0)
    except libvirt.libvirtError as exc:
        if exc.get_error_code() != libvirt.VIR_ERR_SNAPSHOT_REVERT_RISKY:
            raise
        # Its definition was changed since; what the snapshot has of it comes back.
        domain.revertToSnapshot(snapshot, libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE)
