"""What some drivers can do beyond the Driver contract: each a small Protocol that a driver has or has not.

A driver that has one says so in its capabilities (verb in brackets) and one that has not says there why; the manager
looks at the capabilities before it asks. The rules of :mod:`.driver` hold here too: idempotent, one change of an
instance at a time, errors of hypervisor.core.errors, nothing half-made left behind.
"""

from typing import Protocol, runtime_checkable

from hypervisor.core.machines import Snapshot, SnapshotKind
from hypervisor.core.model import Observation, Sizes

__all__ = ["Collecting", "Pausing", "Snapshotting", "Suspending", "Updating"]


@runtime_checkable
class Collecting(Protocol):
    """Keeping files for several instances to use: what none uses any more is collected with the node's images. No verb,
    as nobody asks for it."""

    async def collect(self) -> None:
        """Remove what no instance uses, nor is just about to."""
        ...


@runtime_checkable
class Updating(Protocol):
    """Changing how much it has of the node, while it is there (``update``)."""

    async def update(self, instance_id: str, sizes: Sizes) -> Observation:
        """Have it limited to these sizes, now and after each start; a repeat finds it done.

        One that runs gets them at once, or ``FailedPrecondition`` (``UPDATE_REFUSED``) says why its runtime or its
        guest does not allow that, and nothing has changed.
        """
        ...


@runtime_checkable
class Pausing(Protocol):
    """Freezing in memory (``pause``). A paused instance is PAUSED, keeps its memory and uses no processor; ``stop``,
    ``restart`` and ``delete`` work on it."""

    async def pause(self, instance_id: str) -> Observation:
        """Freeze it; one that is paused is left alone. ``FailedPrecondition`` (``NOT_RUNNING``)."""
        ...

    async def resume(self, instance_id: str) -> Observation:
        """Let it go on; one that runs is left alone. ``FailedPrecondition`` (``NOT_RUNNING``)."""
        ...


@runtime_checkable
class Suspending(Protocol):
    """Putting memory on disk (``suspend``)."""

    async def suspend(self, instance_id: str) -> Observation:
        """Write the guest's memory to disk and end it: STOPPED with reason ``SUSPENDED``. The next ``start`` goes on
        from there, once; a ``restart`` or ``delete`` drops it. One that is suspended is left alone.
        ``FailedPrecondition`` (``NOT_RUNNING``)."""
        ...


@runtime_checkable
class Snapshotting(Protocol):
    """States to go back to (``snapshot``; those of kind DIFF: ``snapshot-diff``).

    Names are unique in their instance, legal DNS labels. Snapshots go with the instance when it is deleted.
    """

    async def create_snapshot(self, instance_id: str, name: str, *, kind: SnapshotKind) -> Snapshot:
        """Keep the present state; the instance is afterwards as it was (running, paused or stopped). A repeat under
        the same name finds it made. ``Unimplemented`` (``CAPABILITY_MISSING``) for a kind it has not;
        ``ResourceExhausted`` (``DISK_FULL``), and then nothing is left of it."""
        ...

    async def list_snapshots(self, instance_id: str) -> tuple[Snapshot, ...]:
        """All, oldest first."""
        ...

    async def restore_snapshot(self, instance_id: str, name: str) -> Observation:
        """Go back: the disk, and the memory where the snapshot has it. The instance then is as it was when the snapshot
        was taken, RUNNING included. What happened since is lost. ``NotFound`` (``SNAPSHOT_NOT_FOUND``)."""
        ...

    async def delete_snapshot(self, instance_id: str, name: str) -> bool:
        """Forget it; whether there was one. ``FailedPrecondition`` (``SNAPSHOT_IN_USE``) while another is based on it
        and cannot stand alone."""
        ...
