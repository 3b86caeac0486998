"""States of an instance that are kept: suspended memory, and snapshots of disk and memory.

A snapshot is a directory ``snapshots/NAME`` of the instance's: a copy of the disk (sharing blocks where the file system
can), and the state that the VMM wrote, unless the instance did not run. A DIFF has of memory what changed since the
snapshot it is based on, and needs that one: deleting a base is refused while a DIFF is based on it.
"""

import asyncio
import os
from pathlib import Path

from msgspec.structs import replace

from hypervisor.agent.drivers.microvm.files import (
    allocated_bytes,
    copy_into,
    disk_error,
    open_own,
    remove_tree,
)
from hypervisor.agent.drivers.microvm.records import Kept
from hypervisor.agent.drivers.microvm.tracking import Live, Tracker
from hypervisor.agent.drivers.microvm.vmm import DISK, SavedState
from hypervisor.core.clock import Clock
from hypervisor.core.errors import FailedPrecondition, InvalidArgument, NotFound
from hypervisor.core.machines import Snapshot, SnapshotKind
from hypervisor.core.names import check_dns_label

__all__ = ["Snapshots"]


class Snapshots:
    """Takes, finds and forgets snapshots; called with the instance's lock held."""

    def __init__(self, tracker: Tracker, *, clock: Clock) -> None:
        self._tracker = tracker
        self._clock = clock

    def directory(self, live: Live, name: str) -> Path:
        """Where a snapshot is."""
        return self._tracker.machine(live.record).directory / "snapshots" / name

    async def take(self, live: Live, name: str, *, kind: SnapshotKind) -> Snapshot:
        """Keep the present state under the name; one that is kept is left alone. The guest pauses meanwhile."""
        violation = check_dns_label("name", name)
        if violation is not None:
            raise InvalidArgument.of_field(violation.field, violation.description)
        known = self._find(live, name)
        if known is not None:
            return known.snapshot
        record = live.record
        if not live.running:
            # A disk alone stands alone.
            kind = SnapshotKind.FULL
        elif kind is SnapshotKind.DIFF and not record.based_on:
            raise FailedPrecondition(
                f"instance {record.instance_id} has no snapshot in this run that {name} could be based on: take a "
                "full one first",
                reason="SNAPSHOT_NO_BASE",
                metadata={"instance_id": record.instance_id, "snapshot": name},
            )
        directory = self.directory(live, name)
        try:
            await asyncio.to_thread(_fresh, directory)
            if live.running:
                await self._save_paused(live, directory, kind)
            else:
                await self._copy_disk(live, directory)
            size = await asyncio.to_thread(allocated_bytes, directory)
        except BaseException as exc:
            await asyncio.to_thread(remove_tree, directory)
            if isinstance(exc, OSError):
                raise disk_error(exc, f"snapshot {name}", directory) from exc
            raise
        record = live.record
        kept = Kept(
            snapshot=Snapshot(
                name=name,
                created_at=self._clock.now(),
                kind=kind,
                parent=record.based_on if live.running else "",
                memory=live.running,
                size_bytes=size,
            ),
            paused=record.paused,
        )
        self._tracker.save(
            live,
            replace(
                record,
                snapshots=(*record.snapshots, kept),
                based_on=name if live.running else record.based_on,
            ),
        )
        return kept.snapshot

    async def _save_paused(self, live: Live, directory: Path, kind: SnapshotKind) -> None:
        record = live.record
        vmm, machine = self._tracker.vmm(record), self._tracker.machine(record)
        if not record.paused:
            await vmm.pause(machine)
        try:
            # What the VMM has noted of changes is gone once it has written them, whatever becomes of the snapshot.
            self._tracker.save(live, replace(live.record, based_on=""))
            await vmm.save(machine, directory, kind=kind)
            await self._copy_disk(live, directory)
        finally:
            if not record.paused:
                await asyncio.shield(vmm.resume(machine))
        self._tracker.save(live, replace(live.record, based_on=record.based_on))

    async def _copy_disk(self, live: Live, directory: Path) -> None:
        record = live.record
        if not record.disk:
            return
        root = self._tracker.vmm(record).root(self._tracker.machine(record).directory)
        await asyncio.to_thread(_copy, root / DISK, directory / DISK, record.uid)

    async def save_memory(self, live: Live, directory: Path) -> None:
        """Write the memory of a running guest, which stays paused, into a new directory."""
        record = live.record
        vmm, machine = self._tracker.vmm(record), self._tracker.machine(record)
        try:
            await asyncio.to_thread(_fresh, directory)
            # As above: no snapshot can be based on an earlier one after this.
            self._tracker.save(live, replace(record, based_on=""))
            if not record.paused:
                await vmm.pause(machine)
            try:
                await vmm.save(machine, directory, kind=SnapshotKind.FULL)
            except BaseException:
                if not record.paused:
                    await asyncio.shield(vmm.resume(machine))
                raise
        except BaseException as exc:
            await asyncio.to_thread(remove_tree, directory)
            if isinstance(exc, OSError):
                raise disk_error(exc, "the memory of the instance", directory) from exc
            raise

    async def bring_disk_back(self, live: Live, name: str) -> None:
        """The disk as it was; the guest does not run."""
        record = live.record
        if not record.disk:
            return
        root = self._tracker.vmm(record).root(self._tracker.machine(record).directory)
        source = self.directory(live, name) / DISK
        try:
            await asyncio.to_thread(_copy, source, root / DISK, record.uid)
        except OSError as exc:
            raise disk_error(exc, f"the disk of snapshot {name}", root) from exc

    def state(self, live: Live, kept: Kept) -> SavedState:
        """What a VMM loads to go on from a snapshot that has memory."""
        bases: list[Path] = []
        current = kept.snapshot
        while current.kind is SnapshotKind.DIFF:
            current = self.find(live, current.parent).snapshot
            bases.insert(0, self.directory(live, current.name))
        return SavedState(
            directory=self.directory(live, kept.snapshot.name),
            kind=kept.snapshot.kind,
            bases=tuple(bases),
            paused=kept.paused,
        )

    def listed(self, live: Live) -> tuple[Snapshot, ...]:
        """All, oldest first."""
        return tuple(
            replace(kept.snapshot, current=kept.snapshot.name == live.record.based_on)
            for kept in live.record.snapshots
        )

    def find(self, live: Live, name: str) -> Kept:
        """``NotFound`` (``SNAPSHOT_NOT_FOUND``)."""
        kept = self._find(live, name)
        if kept is None:
            instance_id = live.record.instance_id
            raise NotFound(
                f"instance {instance_id} has no snapshot {name}: see `instance snapshot list`",
                reason="SNAPSHOT_NOT_FOUND",
                metadata={"instance_id": instance_id, "snapshot": name},
            )
        return kept

    @staticmethod
    def _find(live: Live, name: str) -> Kept | None:
        return next((kept for kept in live.record.snapshots if kept.snapshot.name == name), None)

    async def forget(self, live: Live, name: str) -> bool:
        """Remove one; whether there was one. ``FailedPrecondition`` (``SNAPSHOT_IN_USE``)."""
        record = live.record
        gone = self._find(live, name)
        if gone is None:
            return False
        for kept in record.snapshots:
            if kept.snapshot.kind is SnapshotKind.DIFF and kept.snapshot.parent == name:
                raise FailedPrecondition(
                    f"snapshot {name} of {record.instance_id} is the base of {kept.snapshot.name}: delete that one "
                    "first",
                    reason="SNAPSHOT_IN_USE",
                    metadata={
                        "instance_id": record.instance_id,
                        "snapshot": name,
                        "used_by": kept.snapshot.name,
                    },
                )
        left = tuple(
            replace(kept, snapshot=replace(kept.snapshot, parent=gone.snapshot.parent))
            if kept.snapshot.parent == name
            else kept
            for kept in record.snapshots
            if kept.snapshot.name != name
        )
        based_on = "" if record.based_on == name else record.based_on
        # First the record: what is left in the directory is in nobody's way, and goes with the instance.
        self._tracker.save(live, replace(record, snapshots=left, based_on=based_on))
        try:
            await asyncio.to_thread(remove_tree, self.directory(live, name))
        except OSError as exc:
            raise disk_error(exc, f"the removal of snapshot {name}", self.directory(live, name)) from exc
        return True


def _fresh(directory: Path) -> None:
    remove_tree(directory)
    directory.mkdir(mode=0o700, parents=True)


def _copy(source: Path, target: Path, uid: int) -> None:
    fd = open_own(source)
    try:
        copy_into(fd, target, uid=uid)
    finally:
        os.close(fd)
