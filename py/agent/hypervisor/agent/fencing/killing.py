"""Killing the processes of instances without any runtime: found by what bears the instance's id, which is unique.

A process is an instance's when its control group is named by the id (containers, jailed and plain VMMs), or when it is
a VMM whose command line has it. The rest of the runtime (shims, libvirt) sees a guest that died, and is left alone.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Collection
from pathlib import Path

__all__ = ["MARGIN_S", "kill_instances", "processes_of"]

MARGIN_S = 2.0
"""Servers place nothing elsewhere before this has passed since the lease's end (the least `reconcile.fence_margin`).
What started later is not the old copy: several nodes may be agents of one machine."""
_TICKS = os.sysconf("SC_CLK_TCK")
_STARTED = 19
"""Of the fields of /proc/PID/stat after the name: when the process was started, in ticks since the boot."""

_ID = re.compile(rb"i-[0-9a-z]{26}")
_VMM = re.compile(rb"(qemu-system-|qemu-kvm|kvm$|firecracker)")
_PROC = Path("/proc")
_PAUSE_S = 0.02


def processes_of(
    instance_ids: Collection[str], *, started_before_s: float, proc: Path = _PROC
) -> dict[int, str]:
    """Processes of these instances that were started before this time (seconds since the boot, suspension included), by
    pid. What ends while it is looked at is left out. The children of a container's first process end with it.
    """
    wanted = {instance_id.encode("ascii") for instance_id in instance_ids}
    found = {}
    for entry in os.listdir(proc):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                bearer = _instance_of(proc / entry, wanted)
                if bearer is not None and _is_old(proc / entry, started_before_s):
                    found[int(entry)] = bearer.decode("ascii")
    return found


def kill_instances(
    instance_ids: Collection[str], *, started_before_s: float, timeout_s: float = 2.0, proc: Path = _PROC
) -> frozenset[str]:
    """Kill all that is found of them, again and again until nothing is; returns those of which something is left.

    Blocks for up to ``timeout_s``: a process that hangs in the kernel cannot be killed.
    """
    give_up = time.monotonic() + timeout_s
    while True:
        found = processes_of(instance_ids, started_before_s=started_before_s, proc=proc)
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not found or time.monotonic() >= give_up:
            return frozenset(found.values())
        time.sleep(_PAUSE_S)


def _instance_of(process: Path, wanted: set[bytes]) -> bytes | None:
    name: bytes
    for name in _ID.findall((process / "cgroup").read_bytes()):
        if name in wanted:
            return name
    command = (process / "cmdline").read_bytes()
    if _VMM.match(os.path.basename(command.partition(b"\0")[0])):
        for name in _ID.findall(command):
            if name in wanted:
                return name
    return None


def _is_old(process: Path, started_before_s: float) -> bool:
    """Whether it was started before that time, and is not dead already and only waiting for its parent."""
    fields = (process / "stat").read_bytes().rpartition(b")")[2].split()
    return fields[0] not in (b"Z", b"X") and int(fields[_STARTED]) / _TICKS < started_before_s
