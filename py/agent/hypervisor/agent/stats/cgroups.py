"""Where the control group of a process is: cgroup v1, v2 and the hybrid of both. Pure, over what /proc says."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CgroupPaths", "cgroup_paths", "expected_paths", "uses_v2"]

_CONTROLLERS = ("cpuacct", "cpu", "memory", "blkio", "pids")


@dataclass(frozen=True, slots=True)
class CgroupPaths:
    """Directories of one control group: ``unified`` for v2, else ``controllers`` for v1."""

    unified: Path | None
    controllers: Mapping[str, Path]


def uses_v2(root: Path) -> bool:
    """Whether the hierarchy at ``root`` is cgroup v2 alone; a hybrid counts as v1, where its controllers are."""
    return (root / "cgroup.controllers").is_file()


def _beneath(root: Path, path: str) -> Path | None:
    """``path`` below ``root``; None for one outside of what this process may see (a ``/..`` of a cgroup namespace)."""
    relative = Path(path.lstrip("/"))
    return None if ".." in relative.parts else root / relative


def cgroup_paths(text: str, *, root: Path) -> CgroupPaths | None:
    """The directories named by the text of a ``/proc/PID/cgroup``; None where it names none under ``root``."""
    found: dict[str, Path] = {}
    unified: Path | None = None
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            unified = _beneath(root, path)
            continue
        for controller in controllers.split(","):
            # Controllers mounted together are found under each one's own name too (symbolic links of the mount root).
            directory = _beneath(root / controller, path)
            if controller in _CONTROLLERS and directory is not None:
                found[controller] = directory
    if uses_v2(root):
        return None if unified is None else CgroupPaths(unified, {})
    return CgroupPaths(None, found) if found else None


def expected_paths(cgroup: str, *, root: Path) -> CgroupPaths:
    """Where a runtime puts the control group it was told to make, for a process that is gone."""
    relative = cgroup.lstrip("/")
    if uses_v2(root):
        return CgroupPaths(root / relative, {})
    return CgroupPaths(None, {controller: root / controller / relative for controller in _CONTROLLERS})
