"""Removes what a development cluster can leave behind when it was not stopped in order: shims, mounts, cgroups.

Only what is certainly its own is touched: processes whose command line names its socket, mounts below its directory,
cgroups of its containerd namespace that those processes were in.
"""

import subprocess
from pathlib import Path

from hypervisor.ctl.dev.plan import Plan
from hypervisor.ctl.dev.processes import ProcessId, children_of, command_line, every_process, terminate

__all__ = ["mounts_below", "shims_of", "sweep"]

_CGROUPS = Path("/sys/fs/cgroup")


def shims_of(socket: str) -> list[ProcessId]:
    """Shims that belong to the containerd at that socket."""
    found = []
    for process in every_process():
        words = command_line(process)
        if words and Path(words[0]).name.startswith("containerd-shim") and socket in words:
            found.append(process)
    return found


def mounts_below(directory: Path) -> list[Path]:
    """Mount points below the directory, the deepest first."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        point = Path(line.split()[4].encode().decode("unicode_escape"))
        if point != directory and point.is_relative_to(directory):
            points.append(point)
    return sorted(points, key=lambda point: len(point.parts), reverse=True)


def sweep(plan: Plan) -> list[str]:
    """Remove the leftovers of a cluster that is stopped; returns what could not be removed, in words."""
    if plan.simulated:
        return []
    left = _stop_private_runtime(plan) if plan.private_containerd else []
    # containerd makes one cgroup for the namespace and keeps it when it is empty.
    for group in (_CGROUPS / plan.namespace, *_CGROUPS.glob(f"*/{plan.namespace}")):
        left += _remove_group(group)
    return left


def _stop_private_runtime(plan: Plan) -> list[str]:
    shims = shims_of(plan.containerd)
    guests = [child for shim in shims for child in children_of(shim)]
    groups = {group for guest in guests for group in _groups_of(guest, plan.namespace)}
    left = [f"process {process.pid}" for process in terminate([*guests, *shims], grace_s=0)]
    for point in mounts_below(plan.root):
        done = subprocess.run(
            ["umount", "--lazy", str(point)], capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode:
            left.append(f"mount {point} ({done.stderr.strip()})")
    for group in sorted(groups, key=lambda g: len(g.parts), reverse=True):
        left += _remove_group(group)
    return left


def _remove_group(group: Path) -> list[str]:
    """Remove an empty cgroup; one that is not there is none that is left."""
    try:
        group.rmdir()
    except FileNotFoundError:
        return []
    except OSError as exc:
        return [f"cgroup {group} ({exc.strerror})"]
    return []


def _groups_of(process: ProcessId, namespace: str) -> list[Path]:
    """Its cgroup directories, those below our namespace only."""
    try:
        lines = Path(f"/proc/{process.pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        relative = path.lstrip("/")
        if not relative.startswith(f"{namespace}/"):
            continue
        for name in (controllers, controllers.removeprefix("name="), ""):
            directory = _CGROUPS / name / relative
            if directory.is_dir():
                found.append(directory)
                break
    return found
