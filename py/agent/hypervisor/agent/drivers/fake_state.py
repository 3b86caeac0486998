"""What the fake runtime remembers of an instance, and the directory in which it outlives the agent's process."""

from datetime import datetime
from pathlib import Path

import msgspec

from hypervisor.agent.drivers.driver import Assignment
from hypervisor.core.machines import Snapshot

__all__ = ["FakeRecord", "FakeSnapshot", "FakeStateDirectory"]


class FakeSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A kept state of a fake instance: how it was."""

    snapshot: Snapshot
    running: bool
    paused: bool


class FakeRecord(msgspec.Struct, kw_only=True):
    """One instance of the fake runtime."""

    assignment: Assignment
    running: bool = False
    started_at: datetime | None = None
    finished_at: datetime | None = None
    exit_code: int | None = None
    oom: bool = False
    requested: bool = False
    """Whether the last end was asked for."""
    paused: bool = False
    suspended: bool = False
    snapshots: list[FakeSnapshot] = []


class FakeStateDirectory:
    """One file an instance. Blocking, and small: call it from a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> list[FakeRecord]:
        """Everything kept; files half-written when the process was killed were never renamed and do not count."""
        self._path.mkdir(parents=True, exist_ok=True)
        return [
            msgspec.json.decode(path.read_bytes(), type=FakeRecord)
            for path in sorted(self._path.glob("*.json"))
        ]

    def save(self, instance_id: str, data: bytes) -> None:
        """Keep a record (encoded with :meth:`encode`)."""
        fresh = self._path / f"{instance_id}.new"
        fresh.write_bytes(data)
        fresh.replace(self._path / f"{instance_id}.json")

    def remove(self, instance_id: str) -> None:
        """Forget it."""
        (self._path / f"{instance_id}.json").unlink(missing_ok=True)

    @staticmethod
    def encode(record: FakeRecord) -> bytes:
        """The record as it is kept."""
        return msgspec.json.encode(record)
