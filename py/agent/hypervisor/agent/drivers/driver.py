"""The Driver contract: how an agent runs instances of one runtime, and the vocabulary of it.

Vocabulary
----------
*driver*      runs instances on this node by one runtime (containerd, libvirt, Firecracker) and nothing else: it knows
              no server, no store, no journal. The manager (manager.py) owns policy: order of calls, epochs, journal.
*assignment*  what the node was asked to run: instance id, generation, epoch, type and spec. The id names everything
              the driver makes (container, cgroup, snapshot, FIFOs), so that it can be found again.
*handle*      a small serialisable value a driver returns from ``create`` and needs to find the instance again. The
              manager keeps it in the journal; a driver must also be able to find its instances without it (``list``).
*observation* an instance as the runtime shows it now.
*generation*  version of the spec. *epoch*: which placement; the manager refuses stale ones, drivers only record both
              (as labels or metadata of the runtime's object), so that ``list`` can report them after a restart.

Lifecycle
---------
create -> (start -> stop)* -> delete. Every method is idempotent: a repeat finds its work done and answers the same. A
create that raises has removed what it made. The manager never runs two methods that change one instance at the same
time; calls for different instances run concurrently. ``get``, ``list``, ``stats_source``, ``attach`` may run
at any time.
After the agent's restart ``recover`` is called for each journalled instance before anything else, and running
instances are never disturbed by it.

Errors: classes of hypervisor.core.errors only. ``Unavailable`` (``DRIVER_UNAVAILABLE``) when the runtime cannot be
reached, ``NotFound`` (``INSTANCE_NOT_FOUND``, ``IMAGE_NOT_FOUND``), ``InvalidArgument`` (``IMAGE_INVALID`` ...) for a
spec this runtime cannot run, ``FailedPrecondition`` (``NOT_RUNNING``), ``Unimplemented`` (``CAPABILITY_MISSING``) for
what ``capabilities`` says it lacks. All methods are coroutines and must not block the event loop.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import msgspec

from hypervisor.agent.stats.sources import StatsSource
from hypervisor.core.images import ImageKind, ImageSource
from hypervisor.core.model import ConsoleSize, DriverInfo, InstanceSpec, Observation
from hypervisor.core.states import InstanceType

__all__ = [
    "ASK_AGAIN_S",
    "VERBS",
    "Assignment",
    "Console",
    "ConsoleEndpoint",
    "Driver",
    "EndpointConsole",
    "Handle",
    "LocalImage",
]

VERBS = (
    "create",
    "start",
    "stop",
    "restart",
    "delete",
    "stats",
    "console",
    "resize",
    "recover",
    "exit-events",
    "oom-events",
    "update",
    "pause",
    "suspend",
    "snapshot",
    "snapshot-diff",
)
"""Verbs every driver lists in its capabilities, supported or not: the last five need what :mod:`.powers` describes."""

ASK_AGAIN_S = 5.0
"""After so many seconds a guest that was asked to end is asked anew: one that still boots misses the first time."""

Handle = Mapping[str, str]


class LocalImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image as a file of this node: read-only, whole, verified, and there until the instance is deleted.

    ``format`` is what the content is (``qcow2``, ``raw``, ``bzimage``; see Image.format in image.proto): tell it to
    whatever reads the file, for a raw disk's content can look like anything.
    """

    path: str
    kind: ImageKind
    format: str
    size_bytes: int
    sha256: str


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """What this node was asked to run."""

    instance_id: str
    name: str
    project: str
    type: InstanceType
    spec: InstanceSpec
    labels: dict[str, str] = {}
    generation: int = 1
    epoch: int = 1
    sources: tuple[ImageSource, ...] = ()
    """The images that ``spec`` names as ``image:NAME``, and where they are to be had."""
    images: dict[str, LocalImage] = {}
    """The same as files, by name: filled in when the driver is asked. Drivers look them up by :mod:`.local_images`."""


class Console(Protocol):
    """One attachment to an instance's terminal. The agent holds exactly one per instance and fans it out."""

    @property
    def resizable(self) -> bool:
        """Whether ``resize`` does something."""
        ...

    async def read(self, limit: int = 65536) -> bytes:
        """The next bytes, at least one; empty at the end (the instance ended or the console was closed)."""
        ...

    async def write(self, data: bytes) -> None:
        """Type bytes; waits while the guest does not take them. ``FailedPrecondition`` once it has ended."""
        ...

    async def resize(self, size: ConsoleSize) -> None:
        """Set the terminal's size. ``Unimplemented`` where ``resizable`` is false."""
        ...

    async def close(self) -> None:
        """Detach; idempotent. The instance runs on and its later output is kept for the next attachment, as far as
        the runtime's pipe holds it."""
        ...


@dataclass(frozen=True, slots=True)
class ConsoleEndpoint:
    """Descriptors of a terminal, for another process to take over: it gets duplicates of its own.

    ``output``: what the guest prints is read here (a pty, FIFO or socket). ``input``: what is typed is written here; it
    may be the same; None: the guest takes none any more. ``terminal``: ``output`` is a terminal whose size is that of
    the guest's; else ``Console.resize`` sets it.
    """

    output: int
    input: int | None
    terminal: bool = False


@runtime_checkable
class EndpointConsole(Console, Protocol):
    """A Console that is made of descriptors. The agent then neither reads nor writes by it, but hands the descriptors
    to its console holder, which keeps them over restarts of the agent; one without is pumped by the agent."""

    def endpoint(self) -> ConsoleEndpoint:
        """The descriptors, still owned by this console: valid until ``close``, which closes them and nothing more (what
        ends a connection, as ``shutdown`` does, would end it for the holder too).

        Asked for only when the holder has not got them, and again when it was replaced: what cannot be opened a second
        time (a pipe of an agent before this one, a socket that serves one client) is opened here and not in ``attach``.
        FailedPrecondition (``CONSOLE_GONE``) where nobody has them any more.
        """
        ...


class Driver(Protocol):
    """See the module's docstring for vocabulary, lifecycle and errors."""

    @property
    def name(self) -> str:
        """Stable name, part of the API: ``containerd``."""
        ...

    async def create(self, assignment: Assignment) -> Handle:
        """Prepare the instance so that ``start`` only starts it: image, disk, limits, console."""
        ...

    async def start(self, instance_id: str) -> Observation:
        """Start it; one that runs is left alone. Works again after a stop or an exit, with the same disk."""
        ...

    async def stop(self, instance_id: str, *, grace_s: float) -> Observation:
        """Ask politely, and end it by force after ``grace_s`` seconds (0: at once). One that does not run is left
        alone."""
        ...

    async def restart(self, instance_id: str, *, grace_s: float) -> Observation:
        """Stop and start."""
        ...

    async def delete(self, instance_id: str) -> bool:
        """Remove it and all it used, running or not; returns whether there was anything. Finishes half-made and
        half-removed instances too."""
        ...

    async def get(self, instance_id: str) -> Observation:
        """As the runtime shows it now. ``NotFound`` when there is none."""
        ...

    async def list(self) -> tuple[Observation, ...]:
        """Everything of ours the runtime has, found by its labels, whoever asked for it."""
        ...

    async def stats_source(self, instance_id: str) -> StatsSource:
        """Where its figures are in this run: files of the kernel, or a feed that is asked for many instances at once.
        Asked once a run; what is there is sampled, kept and told by the agent (:mod:`hypervisor.agent.stats`).
        ``FailedPrecondition`` (``NOT_RUNNING``)."""
        ...

    async def attach(self, instance_id: str) -> Console:
        """The instance's terminal, an ``EndpointConsole`` where it can be; one attachment at a time.
        ``FailedPrecondition`` (``NOT_RUNNING``), but an instance that has ended can still be attached to while output
        is left that nobody has read."""
        ...

    async def recover(self, instance_id: str, handle: Handle) -> Observation | None:
        """Adopt an instance after the agent's restart; None when the runtime has nothing of it any more."""
        ...

    def events(self) -> AsyncIterator[Observation]:
        """What happens to instances without being asked for (exit, OOM kill), as it happens, for ever.

        One consumer. After the connection to the runtime was lost it begins again with an observation of every
        instance, so that nothing is missed.
        """
        ...

    async def info(self) -> DriverInfo:
        """Whether it can work here and now, why not, its version and capabilities (every verb of ``VERBS``)."""
        ...

    async def aclose(self) -> None:
        """Let go of the runtime; instances run on. Idempotent."""
        ...
