"""Removes what a development cluster can leave behind when it was not stopped in order: shims, VMMs, mounts,
cgroups, and the directory of its sockets.

Only what is certainly its own is touched: processes whose command line names its socket or configuration, mounts below
its directory, the cgroups of its containerd namespace, whose name is made of that directory, and what runs in them.
"""

import os
import shutil
import subprocess
from pathlib import Path

from hypervisor.ctl.dev.mounts import mounts_below
from hypervisor.ctl.dev.plan import Plan
from hypervisor.ctl.dev.processes import (
    ProcessId,
    children_of,
    command_line,
    every_process,
    identify,
    terminate,
)

__all__ = [
    "console_holders_of",
    "machines_of",
    "processes_in",
    "programs_of",
    "remove_tree",
    "shims_of",
    "sweep",
]

_CGROUPS = Path("/sys/fs/cgroup")
_VMMS = ("qemu-system-", "firecracker")


def shims_of(socket: str) -> list[ProcessId]:
    """Shims that belong to the containerd at that socket."""
    found = []
    for process in every_process():
        words = command_line(process)
        if words and Path(words[0]).name.startswith("containerd-shim") and socket in words:
            found.append(process)
    return found


def console_holders_of(socket: Path) -> list[ProcessId]:
    """Console holders that listen there: their command line names the socket."""
    return [process for process in every_process() if _is_told(process, "--socket", socket)]


def programs_of(plan: Plan) -> list[ProcessId]:
    """Programs that run by the cluster's configuration, on record or not: a supervisor that was killed may have started
    one and not told of it."""
    told = [("--config", plan.layout.config(program)) for program in ("containerd", "server", "agent")]
    told.append(("--pid-file", plan.libvirtd.pid_file))
    return [
        process
        for process in every_process()
        if any(_is_told(process, option, value) for option, value in told)
    ]


def _is_told(process: ProcessId, option: str, value: Path) -> bool:
    words = command_line(process)
    return option in words[:-1] and words[words.index(option) + 1] == str(value)


def processes_in(top: Path) -> set[ProcessId]:
    """What runs in a tree of cgroups; nothing where there is no such tree."""
    found = set()
    for directory, _, _ in os.walk(top):
        try:
            numbers = (Path(directory) / "cgroup.procs").read_text(encoding="ascii").split()
        except OSError:
            # Removed a moment ago.
            continue
        found |= {process for number in numbers if (process := identify(int(number))) is not None}
    return found


def sweep(plan: Plan) -> list[str]:
    """Remove the leftovers of a cluster that is stopped; returns what could not be removed, in words."""
    if plan.simulated:
        return []
    left = _stop_machines(plan)
    left += _stop_private_runtime(plan) if plan.private_containerd else []
    for top in _cgroups_of(plan):
        left += _remove_cgroups(top)
    # Not with its data: sockets and FIFOs serve nobody once their programs have ended, and who deletes the cluster's
    # directory by hand does not think of this one.
    return left + remove_tree(plan.run)


def remove_tree(top: Path) -> list[str]:
    """Remove a directory and all in it, following no link; returns what could not be removed, in words."""
    left: list[str] = []

    def failed(_function: object, path: str, info: tuple[object, BaseException, object]) -> None:
        error = info[1]
        if not isinstance(error, FileNotFoundError):
            left.append(f"{path} ({error.strerror if isinstance(error, OSError) else error})")

    shutil.rmtree(top, onerror=failed)
    return left


def machines_of(plan: Plan) -> list[ProcessId]:
    """VMMs that use a directory of the cluster's, as their command line tells; jailed ones see none of it, and have
    the id of an instance there instead."""
    places = (str(plan.root), str(plan.run))
    ids = _microvms_of(plan)
    found = []
    for process in every_process():
        words = command_line(process)
        if not words or not Path(words[0]).name.startswith(_VMMS):
            continue
        named = any(f"{place}/" in word for place in places for word in words)
        if named or ids.intersection(word.rpartition("=")[2] for word in words):
            found.append(process)
    return found


def _microvms_of(plan: Plan) -> frozenset[str]:
    """Ids of the microVMs that have a directory in the cluster's."""
    try:
        return frozenset(os.listdir(plan.layout.data("microvms") / "instances"))
    except OSError:
        return frozenset()


def _stop_machines(plan: Plan) -> list[str]:
    return [f"process {process.pid}" for process in terminate(machines_of(plan), grace_s=0)]


def _cgroups_of(plan: Plan) -> list[Path]:
    """That of version 2, then one for each controller of version 1. The namespace is of this cluster alone."""
    return [_CGROUPS / plan.namespace, *_CGROUPS.glob(f"*/{plan.namespace}")]


def _stop_private_runtime(plan: Plan) -> list[str]:
    """End the shims with what they run, and what a shim that was killed has left running; then undo the mounts."""
    shims = shims_of(plan.containerd)
    guests = {child for shim in shims for child in children_of(shim)}
    for top in _cgroups_of(plan):
        guests |= processes_in(top)
    left = [f"process {process.pid}" for process in terminate([*guests, *shims], grace_s=0)]
    for point in mounts_below(plan.root):
        done = subprocess.run(
            ["umount", "--lazy", str(point)], capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode:
            left.append(f"mount {point} ({done.stderr.strip()})")
    return left


def _remove_cgroups(top: Path) -> list[str]:
    """Remove a tree of cgroups from its leaves; those that hold processes stay."""
    left = []
    for directory, _, _ in os.walk(top, topdown=False):
        try:
            Path(directory).rmdir()
        except FileNotFoundError:
            continue
        except OSError as exc:
            left.append(f"cgroup {directory} ({exc.strerror})")
    return left
