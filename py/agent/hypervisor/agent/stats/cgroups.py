"""Where the control group of a process is: cgroup v1, v2 and the hybrid of both; and what is read there."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hypervisor.ext.stats_sampler import Sampler, Sources

__all__ = [
    "CgroupPaths",
    "cgroup_paths",
    "counts_transfers",
    "expected_paths",
    "read_oom_kills",
    "sampler_sources",
    "uses_v2",
]

_CONTROLLERS = ("cpuacct", "cpu", "memory", "blkio", "pids")
_HYBRID = "unified"
"""Where a hybrid has its hierarchy of version 2, below the root of all hierarchies."""


@dataclass(frozen=True, slots=True)
class CgroupPaths:
    """Directories of one control group: ``unified`` for v2, else ``controllers`` for v1."""

    unified: Path | None
    controllers: Mapping[str, Path]
    pressure: Path | None = None
    """In a hybrid, beside ``controllers``: the group's directory in the unified hierarchy, which has no controllers and
    tells pressure (PSI) alone. None where the processes have no group of their own there: the pressure of the group
    that they share with others would say nothing of them."""


def uses_v2(root: Path) -> bool:
    """Whether the hierarchy at ``root`` is cgroup v2 alone; a hybrid counts as v1, where its controllers are."""
    return (root / "cgroup.controllers").is_file()


def counts_transfers(root: Path, *, proc_root: Path = Path("/proc")) -> bool:
    """Whether blkio of version 1 counts what goes to and comes from the devices of this machine.

    Linux 6.10 and later count only for a device on which a limit (``blkio.throttle.read_bps_device``) was set in some
    group. Of the others no group says anything, not even the root group of what all have done; and that nothing would
    be taken for a measured 0. So it is looked whether there the busiest device is named.
    """
    for name in ("blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_service_bytes"):
        with suppress(OSError):
            named = {line.split()[0] for line in (root / "blkio" / name).read_text("ascii").splitlines()}
            return _busiest_device(proc_root) in named
    return True


def _busiest_device(proc_root: Path) -> str:
    """The number, such as 8:0, of the device with the most sectors read and written. Raises OSError."""
    rows = [line.split() for line in (proc_root / "diskstats").read_text("ascii").splitlines()]
    # A disk comes before its partitions, which cannot have more.
    most = max(rows, key=lambda row: int(row[5]) + int(row[9]), default=["", ""])
    return f"{most[0]}:{most[1]}"


def _controllers(root: Path, proc_root: Path) -> Collection[str]:
    """Those of version 1 whose figures are of use."""
    counted = counts_transfers(root, proc_root=proc_root)
    return _CONTROLLERS if counted else [c for c in _CONTROLLERS if c != "blkio"]


def _beneath(root: Path, path: str) -> Path | None:
    """``path`` below ``root``; None for one outside of what this process may see (a ``/..`` of a cgroup namespace)."""
    relative = Path(path.lstrip("/"))
    return None if ".." in relative.parts else root / relative


def cgroup_paths(text: str, *, root: Path, proc_root: Path = Path("/proc")) -> CgroupPaths | None:
    """The directories named by the text of a ``/proc/PID/cgroup``; None where it names none under ``root``."""
    found: dict[str, Path] = {}
    own: set[str] = set()
    unified: str | None = None
    wanted = _controllers(root, proc_root)
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            unified = path
            continue
        for controller in controllers.split(","):
            # Controllers mounted together are found under each one's own name too (symbolic links of the mount root).
            directory = _beneath(root / controller, path)
            if controller in wanted and directory is not None:
                found[controller] = directory
                own.add(path)
    if uses_v2(root):
        directory = None if unified is None else _beneath(root, unified)
        return None if directory is None else CgroupPaths(directory, {})
    pressure = _beneath(root / _HYBRID, unified) if unified in own else None
    return CgroupPaths(None, found, pressure) if found else None


def expected_paths(cgroup: str, *, root: Path, proc_root: Path = Path("/proc")) -> CgroupPaths:
    """Where a runtime puts the control group it was told to make, for a process that is gone."""
    relative = cgroup.lstrip("/")
    if uses_v2(root):
        return CgroupPaths(root / relative, {})
    controllers = {controller: root / controller / relative for controller in _controllers(root, proc_root)}
    return CgroupPaths(None, controllers, root / _HYBRID / relative)


def sampler_sources(paths: CgroupPaths, *, pid: int, proc_root: Path) -> Sources:
    """What the sampler reads of a control group, and of the network of the process ``pid`` in it."""
    return Sources(
        cgroup2=paths.unified or paths.pressure,
        cgroup1=paths.controllers,
        net_dev=proc_root / str(pid) / "net" / "dev",
    )


def read_oom_kills(paths: CgroupPaths) -> int | None:
    """How many processes of the control group the kernel killed for lack of memory; None when it is gone."""
    with Sampler(history=1) as sampler:
        try:
            slot = sampler.add(Sources(cgroup2=paths.unified, cgroup1=paths.controllers))
        except OSError:
            return None
        sampler.sample(slot, 0, 0)
        record = sampler.latest(slot)
    return None if record is None else record.oom_kills
