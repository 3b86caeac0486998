"""What survives the agent: one file in each instance's directory, from which it is found and described again."""

import contextlib
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec
import structlog

from hypervisor.agent.drivers.microvm.vmm import Run
from hypervisor.core.machines import Snapshot
from hypervisor.core.model import InstanceSpec

__all__ = ["Kept", "Record", "RecordStore", "RunEnd"]

_NAME = "instance.json"

_log = structlog.get_logger(__name__)


class RunEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How the last run ended. ``reason``: EXITED, CRASHED, KILLED, OOM_KILLED, STOPPED, SUSPENDED, NODE_RESTARTED."""

    reason: str
    message: str
    finished_at: datetime
    exit_code: int | None
    requested: bool
    """Whether the driver was asked for it."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot, and whether the guest was paused when it was taken. ``snapshot.memory`` false: it did not run."""

    snapshot: Snapshot
    paused: bool = False


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """An instance as it is kept."""

    instance_id: str
    name: str
    project: str
    generation: int
    epoch: int
    spec: InstanceSpec
    vmm: str
    """``Vmm.key`` of the one that runs it."""
    vmm_version: str
    vmm_reason: str
    """Why it is that one."""
    uid: int = 0
    initrd: bool = False
    disk: bool = False
    started_at: datetime | None = None
    starting: bool = False
    """A process may exist that ``run`` does not know yet."""
    run: Run | None = None
    paused: bool = False
    stop_asked: bool = False
    """Whether this run was told to end: recorded before it is, so that whoever sees the end knows it was asked for."""
    suspended: bool = False
    """Whether its memory is on disk, to go on from there."""
    going_on: bool = False
    """Its memory has been loaded, and its guest is being let go on: it may have run since."""
    end: RunEnd | None = None
    snapshots: tuple[Kept, ...] = ()
    based_on: str = ""
    """Name of the snapshot since which the VMM has noted changes of memory in this run."""


class RecordStore:
    """Directories and records below ``root``. Blocks for as long as a small file takes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def directory(self, instance_id: str) -> Path:
        """The instance's own directory."""
        return self.root / "instances" / instance_id

    def ids(self) -> tuple[str, ...]:
        """Instances that have a directory, recorded or not."""
        try:
            return tuple(sorted(os.listdir(self.root / "instances")))
        except FileNotFoundError:
            return ()

    def load(self) -> Iterator[Record]:
        """All records. One that cannot be read is passed over and logged: its instance can still be deleted."""
        for instance_id in self.ids():
            path = self.directory(instance_id) / _NAME
            try:
                record = msgspec.json.decode(path.read_bytes(), type=Record)
            except FileNotFoundError:
                _log.warning("microvm_without_record", instance_id=instance_id, path=str(path))
            except (OSError, msgspec.MsgspecError) as exc:
                _log.error("microvm_record_unreadable", instance_id=instance_id, error=str(exc))
            else:
                if record.instance_id == instance_id:
                    yield record

    def save(self, record: Record) -> None:
        """Replace the record in one step. Safe against the end of the agent, not of the machine, which ends all runs
        too; what is older than a run is on disk by then. Raises OSError."""
        directory = self.directory(record.instance_id)
        path = directory / f"{_NAME}.new"
        path.write_bytes(msgspec.json.encode(record))
        path.replace(directory / _NAME)

    def forget(self, instance_id: str) -> None:
        """Remove the record, the last thing to go before its directory."""
        with contextlib.suppress(FileNotFoundError):
            (self.directory(instance_id) / _NAME).unlink()
