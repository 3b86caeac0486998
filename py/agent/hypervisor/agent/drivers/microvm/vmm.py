"""What a VMM has to be able to do so that the microVM driver can run guests by it, and the vocabulary of that.

Vocabulary
----------
*VMM*        a program that runs one guest in each of its processes: Firecracker, QEMU. A :class:`Vmm` object knows how
             to call and control it; it keeps nothing of an instance, so that it works for another agent's too.
*machine*    all a VMM is told of one instance (:class:`Machine`). Paths of users are no part of it: the driver has
             checked and copied what they named.
*root*       the directory that the VMM process has as its working directory (Firecracker's jail: as its ``/`` too),
             with the machine's files under fixed names: :data:`KERNEL`, :data:`INITRD`, :data:`DISK`. What a VMM
             writes is named relative to it, so that a saved state can be loaded in another root.
*run*        one process of a VMM, from its start to its end.
*state*      memory and devices of a paused guest, in files of the VMM's own in one directory.

Who does what
-------------
The driver owns directories, files, uids, taps, control groups, console FIFOs, processes (spawning, identity, signals,
exit watch) and the records that survive the agent. A VMM has the command line, the control socket and the formats of
its states. A start is: ``launch`` (command line), the driver spawns it with the guest's serial console as standard
input and output and ``LOG`` as standard error, then ``boot``. What fails there is killed and tidied up by the driver.

Nothing here blocks the event loop. Errors: hypervisor.core.errors; a VMM that does not answer is ``Unavailable``
(``VMM_UNREACHABLE``), one that refuses a machine ``FailedPrecondition`` (``VMM_REFUSED``) with what it said.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from hypervisor.core.machines import MicrovmOptions, SnapshotKind, VmmChoice

__all__ = [
    "DISK",
    "INITRD",
    "KERNEL",
    "LOG",
    "Card",
    "End",
    "Launch",
    "Machine",
    "Run",
    "SavedState",
    "Vmm",
    "VmmPhase",
]

KERNEL = "kernel"
INITRD = "initrd"
DISK = "disk.raw"
LOG = "vmm.log"
"""The VMM's own words, never the guest's; kept for as long as the instance, begun anew by each start."""


@dataclass(frozen=True, slots=True)
class Card:
    """A network card: the tap of the node it is plugged into, and its address (``06:00:ac:10:00:02``)."""

    tap: str
    mac: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One guest, checked and prepared. ``directory`` is the instance's own and holds the root and everything else;
    ``run_dir`` is for sockets whose paths have to be short, and may be gone after the node's restart."""

    instance_id: str
    directory: Path
    run_dir: Path
    vcpus: int
    memory_mib: int
    kernel_args: str = ""
    """Of the specification; the VMM adds what its devices need."""
    initrd: bool = False
    disk: bool = False
    cards: tuple[Card, ...] = ()
    options: MicrovmOptions = field(default_factory=MicrovmOptions)
    uid: int = 0
    """User and group of this instance alone, owner of its files; 0: the VMM runs as the agent does."""
    track_changes: bool = True
    """Whether states of kind DIFF are to be possible."""


@dataclass(frozen=True, slots=True)
class Run:
    """A process, so that a later one with its number is not taken for it. ``started``: ticks since the kernel's boot,
    field 22 of ``/proc/PID/stat``; ``boot_id``: which boot."""

    pid: int
    started: int
    boot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a VMM's process is made. It becomes leader of its own session, with ``root`` as working directory."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """All of its environment."""
    keep: tuple[int, ...] = ()
    """Descriptors to be inherited under their numbers; the driver closes them afterwards."""
    close: tuple[int, ...] = ()
    """Descriptors of the agent that the process needs until ``boot`` is done; the driver closes them then."""
    listens: Callable[[], Awaitable[None]] | None = None
    """Returns once the process takes requests, or never; it has no memory for its guest before. The driver moves it
    into its control group meanwhile, and then calls ``boot``. None: it is moved first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """A state that ``save`` has written into ``directory``, made of a machine that was the same. A DIFF has the
    directories of those it is based on, oldest first (a FULL one), in ``bases``."""

    directory: Path
    kind: SnapshotKind = SnapshotKind.FULL
    bases: tuple[Path, ...] = ()
    paused: bool = False
    """Leave the guest paused after loading."""


class VmmPhase(StrEnum):
    """What a VMM says of its guest."""

    STARTING = "starting"
    """The process is there, the guest has not been started."""
    RUNNING = "running"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended. ``crashed``: by a fault, not by the guest's or the driver's wish. ``exit_code``: of the process,
    128 + n for signal n; what the log tells where nobody could wait for it; None: not known."""

    crashed: bool
    exit_code: int | None
    message: str = ""


class Vmm(Protocol):
    """See the module's docstring. All methods can be repeated."""

    @property
    def key(self) -> str:
        """Stable and unique name, kept in records: ``firecracker``, ``qemu-tcg``."""
        ...

    @property
    def choice(self) -> VmmChoice:
        """Which word of a specification means it. One word may mean several: the first that works is taken."""
        ...

    @property
    def lacks(self) -> Mapping[str, str]:
        """Verbs of the driver (``driver.VERBS``) that it cannot do, with the reason."""
        ...

    @property
    def overhead_mib(self) -> int:
        """Memory its process may need beside the guest's, MiB."""
        ...

    async def version(self) -> str:
        """Program and version in a few words (``firecracker 1.12.1``), asked of the program itself.

        ``Unavailable`` (``DRIVER_UNAVAILABLE``) where it cannot run here, with why and how to mend it. That it answers
        does not mean that guests boot: the driver's probe finds out.
        """
        ...

    def root(self, directory: Path) -> Path:
        """The root of a machine with this directory; pure."""
        ...

    def check(self, machine: Machine) -> None:
        """Refuse what this VMM cannot run: ``InvalidArgument`` that names the field (``spec.microvm.metadata``). Called
        by a create, with the machine's files in its root."""
        ...

    async def launch(self, machine: Machine) -> Launch:
        """The command line for a start; what an earlier run left behind (sockets) is removed."""
        ...

    async def boot(self, machine: Machine, run: Run, state: SavedState | None = None) -> None:
        """Configure the process that was just spawned and let its guest run, from the beginning or from ``state``.

        Must end soon, with an error, when the process does (``Unavailable``): the driver cancels it then, and says in
        its own error what the log says.
        """
        ...

    async def phase(self, machine: Machine) -> VmmPhase:
        """What its guest does now."""
        ...

    async def ask_to_stop(self, machine: Machine) -> bool:
        """Ask the guest to end (Ctrl-Alt-Del, ACPI power button); whether there is a way to ask. Does not wait."""
        ...

    async def pause(self, machine: Machine) -> None: ...

    async def resume(self, machine: Machine) -> None: ...

    async def save(self, machine: Machine, directory: Path, *, kind: SnapshotKind) -> None:
        """Write the state of the paused guest into ``directory``, which exists and is empty. A DIFF: of memory only
        what changed since the state saved or loaded last. ``ResourceExhausted`` (``DISK_FULL``)."""
        ...

    def end_of(self, machine: Machine, exit_code: int | None) -> End:
        """How a run ended, by its exit code (None: another agent's child) and ``LOG``. Reads at most 64 KiB."""
        ...

    def remove(self, machine: Machine) -> None:
        """Remove what it made outside of ``directory`` and ``run_dir``, which the driver removes."""
        ...
