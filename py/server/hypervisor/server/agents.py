"""What the control plane asks of nodes, as Protocols, and what their consoles yield.

``agents_grpc.py`` implements them over gRPC; tests have one in memory.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from hypervisor.core.consoles import ConsoleOptions, LogOptions, LogPiece
from hypervisor.core.images import ImageSource
from hypervisor.core.machines import Snapshot, SnapshotKind
from hypervisor.core.model import Instance, InstanceStats, Node, Observation, Sizes
from hypervisor.server.services import ConsoleSession

__all__ = [
    "Agent",
    "Agents",
    "CallContext",
    "ConsoleClosed",
    "ConsoleData",
    "ConsoleNotice",
    "ConsoleOpened",
    "ConsoleSkipped",
]


@dataclass(frozen=True, slots=True)
class CallContext:
    """Under which request id to call, and after how many seconds to give up."""

    request_id: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class ConsoleOpened:
    """The session began; ``replay_bytes`` of past output follow first."""

    instance_id: str
    replay_bytes: int
    resizable: bool
    position: int = 0


@dataclass(frozen=True, slots=True)
class ConsoleData:
    """Bytes from the instance. ``message``: the ConsoleOutput they came in, encoded, where there is nothing else in it:
    it can be passed on as it is."""

    data: bytes | memoryview
    message: bytes | None = None


@dataclass(frozen=True, slots=True)
class ConsoleSkipped:
    """This viewer was too slow and did not get so many bytes."""

    byte_count: int


@dataclass(frozen=True, slots=True)
class ConsoleNotice:
    """Something about the console happened; see ConsoleOutput.Notice. Output goes on."""

    reason: str
    message: str
    position: int


@dataclass(frozen=True, slots=True)
class ConsoleClosed:
    """The console ended: EXITED, DELETED or DETACHED. Nothing follows."""

    reason: str
    exit_code: int | None = field(default=None)


class Agent(Protocol):
    """One node's agent. All calls are idempotent and keyed by the instance's id, generation and epoch.

    Errors: what the agent answers; ``Unavailable`` (``NODE_UNREACHABLE``) when it cannot be reached or the call broke
    off, so that whether it was carried out is unknown; ``DeadlineExceeded`` after ``context.timeout_s``.
    """

    async def create(
        self, instance: Instance, context: CallContext, *, start: bool, images: tuple[ImageSource, ...] = ()
    ) -> Observation:
        """Make it of ``images`` (those its spec names) and, with ``start``, start it. When it fails nothing of it is
        left on the node."""
        ...

    async def start(self, instance: Instance, context: CallContext) -> Observation:
        """Start it; one that runs is left alone."""
        ...

    async def stop(self, instance: Instance, context: CallContext, *, grace_s: float) -> Observation:
        """Stop it; one that does not run is left alone."""
        ...

    async def restart(self, instance: Instance, context: CallContext, *, grace_s: float) -> Observation:
        """Stop and start it."""
        ...

    async def delete(self, instance: Instance, context: CallContext, *, grace_s: float) -> bool:
        """Remove it and all it used; returns whether there was anything."""
        ...

    async def delete_copy(self, seen: Observation, context: CallContext) -> bool:
        """Remove exactly the copy that was seen; a newer one stays (``FailedPrecondition``, ``STALE_EPOCH``)."""
        ...

    async def update(self, instance: Instance, context: CallContext, *, sizes: Sizes) -> Observation:
        """Give it more or less of its node. ``FailedPrecondition`` (``UPDATE_REFUSED``) where that cannot be done while
        it runs; nothing has changed then."""
        ...

    async def pause(self, instance: Instance, context: CallContext) -> Observation:
        """Freeze it in memory; one that is paused is left alone."""
        ...

    async def resume(self, instance: Instance, context: CallContext) -> Observation:
        """Let it go on; one that runs is left alone."""
        ...

    async def suspend(self, instance: Instance, context: CallContext) -> Observation:
        """Put its memory on disk and end it; one that is suspended is left alone."""
        ...

    async def create_snapshot(
        self, instance: Instance, context: CallContext, *, name: str, kind: SnapshotKind
    ) -> Observation:
        """Keep its present state; one that is kept already under that name is left alone."""
        ...

    async def list_snapshots(self, instance: Instance, context: CallContext) -> tuple[Snapshot, ...]:
        """What is kept of it, oldest first."""
        ...

    async def restore_snapshot(self, instance: Instance, context: CallContext, *, name: str) -> Observation:
        """Go back to what was kept. ``NotFound`` (``SNAPSHOT_NOT_FOUND``)."""
        ...

    async def delete_snapshot(self, instance: Instance, context: CallContext, *, name: str) -> Observation:
        """Forget what was kept; one that is not there is no error."""
        ...

    async def list(self, context: CallContext) -> tuple[Observation, ...]:
        """Everything the node has."""
        ...

    async def stats(self, instance_id: str, context: CallContext) -> InstanceStats:
        """A fresh sample. ``FailedPrecondition`` (``NOT_RUNNING``)."""
        ...

    def watch_stats(
        self, instance_id: str, context: CallContext, *, interval_s: float, history_s: float
    ) -> AsyncGenerator[InstanceStats, None]:
        """Those of the last ``history_s`` seconds, then samples until the iterator is closed or the instance ends.
        ``context.timeout_s`` does not apply."""
        ...

    async def attach_console(
        self,
        instance_id: str,
        context: CallContext,
        options: ConsoleOptions,
    ) -> ConsoleSession:
        """Open the terminal. ``context.timeout_s`` is for the opening; the session has no end."""
        ...

    def logs(
        self, instance_id: str, context: CallContext, options: LogOptions
    ) -> AsyncGenerator[LogPiece, None]:
        """What it printed, and what it prints until it ends where that is asked for. ``context.timeout_s`` does not
        apply."""
        ...


class Agents(Protocol):
    """All agents."""

    def agent(self, node: Node) -> Agent:
        """The agent of a node, at the address its record has now."""
        ...
