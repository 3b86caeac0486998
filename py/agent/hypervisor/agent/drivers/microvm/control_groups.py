"""One control group for each VMM, version 1 or 2: what it may use, and where its figures are read."""

import contextlib
import errno
import os
from pathlib import Path

import structlog

from hypervisor.agent.drivers.cpu_quota import apply_cpu_limit, cpu_limit
from hypervisor.agent.drivers.microvm.processes import end_now
from hypervisor.agent.stats.cgroups import CgroupPaths, expected_paths, read_oom_kills, uses_v2

__all__ = ["ControlGroups"]

_ENDS_WITHIN_S = 5.0

_log = structlog.get_logger(__name__)


class ControlGroups:
    """Groups ``parent/NAME`` in each hierarchy at ``root``. Raises OSError where it may make none."""

    def __init__(self, root: Path, parent: str) -> None:
        self._root = root
        self._parent = parent
        self._v2 = uses_v2(root)
        self._prepared = False
        self._parents: tuple[Path, ...] = ()

    def paths(self, name: str) -> CgroupPaths:
        """Where the group is."""
        return expected_paths(f"{self._parent}/{name}", root=self._root)

    def exists(self, name: str) -> bool:
        """Whether there is anything of it."""
        return any(path.is_dir() for path in self._directories(name))

    def names(self) -> tuple[str, ...]:
        """All groups there are."""
        found: set[str] = set()
        for directory in self._parent_directories():
            with contextlib.suppress(FileNotFoundError):
                found.update(entry.name for entry in os.scandir(directory) if entry.is_dir())
        return tuple(sorted(found))

    def make(self, name: str, *, cpu_millis: int, memory_bytes: int) -> None:
        """Make it, empty, with its limits; one that is left of an earlier run is made anew. The processes of that,
        if any are left, are killed."""
        self.remove(name)
        self._prepare()
        paths = self.paths(name)
        for directory in self._directories(name):
            directory.mkdir(parents=True, exist_ok=True)
        apply_cpu_limit(paths, cpu_limit(cpu_millis))
        if paths.unified is not None:
            _write(paths.unified / "memory.max", str(memory_bytes))
        else:
            _write(paths.controllers["memory"] / "memory.limit_in_bytes", str(memory_bytes))

    def add(self, name: str, pid: int) -> None:
        """Move a process into it; what it allocates from now on counts there."""
        for directory in self._directories(name):
            _write(directory / "cgroup.procs", str(pid))

    def oom_kills(self, name: str) -> int:
        """How many processes in it the kernel killed for lack of memory."""
        return read_oom_kills(self.paths(name)) or 0

    def pids(self, name: str) -> tuple[int, ...]:
        """Processes in it."""
        found: set[int] = set()
        for directory in self._directories(name):
            with contextlib.suppress(FileNotFoundError):
                found.update(map(int, (directory / "cgroup.procs").read_text("ascii").split()))
        return tuple(sorted(found))

    def remove(self, name: str) -> bool:
        """Kill what is in it and remove it; whether there was one. What
        does not end keeps it until the next time. Blocks meanwhile."""
        existed = False
        for directory in self._directories(name):
            try:
                directory.rmdir()
                existed = True
            except FileNotFoundError:
                continue
            except OSError as exc:
                if exc.errno != errno.EBUSY:
                    raise
                existed = True
                for pid in self.pids(name):
                    end_now(pid, timeout_s=_ENDS_WITHIN_S)
                try:
                    directory.rmdir()
                except OSError as still:
                    _log.warning("microvm_cgroup_busy", cgroup=str(directory), error=str(still))
        return existed

    def remove_parent(self) -> None:
        """Remove the group around all, when it is empty: a node without microVMs has nothing of them."""
        for directory in self._parent_directories():
            with contextlib.suppress(OSError):
                directory.rmdir()
        self._prepared = False

    def _directories(self, name: str) -> list[Path]:
        """The group's directory in each hierarchy."""
        return [parent / name for parent in self._parent_directories()]

    def _parent_directories(self) -> tuple[Path, ...]:
        # Looked for once: what is mounted stays, and looking takes longer than all that is done with a group.
        if not self._parents:
            self._parents = _in_each_hierarchy(expected_paths(self._parent, root=self._root), self._root)
        return self._parents

    def _prepare(self) -> None:
        """With version 2, controllers have to be handed down from the root."""
        if not self._v2 or self._prepared:
            return
        directory = self._root
        for part in Path(self._parent).parts:
            _hand_down(directory)
            directory /= part
            directory.mkdir(exist_ok=True)
        _hand_down(directory)
        self._prepared = True


def _hand_down(directory: Path) -> None:
    there = (directory / "cgroup.controllers").read_text("ascii").split()
    wanted = [f"+{name}" for name in ("cpu", "memory", "io", "pids") if name in there]
    _write(directory / "cgroup.subtree_control", " ".join(wanted))


def _in_each_hierarchy(paths: CgroupPaths, root: Path) -> tuple[Path, ...]:
    if paths.unified is not None:
        return (paths.unified,)
    # Controllers that are mounted together lead to one directory by several names; some may not be mounted at all.
    found = {
        (root / controller).resolve() / path.relative_to(root / controller)
        for controller, path in paths.controllers.items()
        if (root / controller).is_dir()
    }
    if paths.pressure is not None and (root / "unified").is_dir():
        # A hybrid: what the group waits for is told by the hierarchy of version 2 alone.
        found.add(paths.pressure)
    return tuple(sorted(found))


def _write(path: Path, value: str) -> None:
    # Not created where it does not exist: on a plain file system that would hide a missing controller.
    with path.open("r+", encoding="ascii", buffering=1) as file:
        file.write(value)
